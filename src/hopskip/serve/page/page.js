// The page: connects to the server, and answers to buttons and keys.

import { ask, drawAll, hooks, lastAnswer, showSend, startNew, stop } from "./conversation.js";
import { showControls } from "./controls.js";
import { showFigures } from "./figures.js";
import { fetchCard, useKey } from "./server.js";
import { closeChats, drawChats } from "./sidebar.js";
import { $, applyTheme, el, live, saveSettings, settings } from "./state.js";
import { hideTip } from "./tokens.js";

const RETRY_MILLISECONDS = 3000;

let again = 0;  // the timer of the next try

async function connect() {
  clearTimeout(again);
  try {
    live.card = await fetchCard();
    showName(live.card.id);
    $("dot").className = "dot ok";
    $("key-form").hidden = true;
    $("status").title = `${live.card.id}: ${live.card.hopskip.num_hidden_layers} layers, context ${live.card.max_model_len}, draft ${live.card.hopskip.draft}`;
  } catch (error) {
    $("dot").className = "dot bad";
    $("model").textContent = error.status === 401 ? "wants a key" : error.status ? "not ready" : "not reachable";
    if (error.status === 401) askForKey();
    else again = setTimeout(connect, RETRY_MILLISECONDS);
  }
  showControls();
  showFigures(lastAnswer());
  showSend();
}

// On a phone there is no room for whose model it is.
function showName(id) {
  const start = id.lastIndexOf("/") + 1;
  $("model").replaceChildren(el("span", "owner", id.slice(0, start)), id.slice(start));
}

function askForKey() {
  $("key-form").hidden = false;
  $("key").focus();
}
$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  useKey($("key").value.trim());
  $("key").value = "";
  connect();
});
hooks.onRefused = askForKey;
hooks.onLost = connect;

function grow() {
  const input = $("input");
  input.style.height = "auto";
  input.style.height = `${input.scrollHeight}px`;
  showSend();
}

function submit() {
  const text = $("input").value.trim();
  if (!text || !live.card || live.running) return;
  $("input").value = "";
  grow();
  ask(text);
}

$("input").addEventListener("input", grow);
$("input").addEventListener("keydown", (event) => {
  // the Enter that ends a composition belongs to it; Safari sends it after the composition, with this code
  if (event.key !== "Enter" || event.shiftKey || event.isComposing || event.keyCode === 229) return;
  event.preventDefault();
  submit();
});
$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  if (live.running) stop();
  else submit();
});

document.addEventListener("keydown", (event) => {
  if (event.isComposing) return;
  if (event.key === "Escape") {
    if (closePanel() || closeChats()) return;
    stop();
    hideTip();
  }
  if (event.key.toLowerCase() === "o" && event.ctrlKey && event.shiftKey) { event.preventDefault(); startNew(); $("input").focus(); }
});

$("theme").onclick = () => {
  settings.theme = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
  applyTheme();
  saveSettings();
};

function closePanel() {
  if (!$("panel").classList.contains("open")) return false;
  $("panel").classList.remove("open");
  $("panel-toggle").setAttribute("aria-expanded", "false");
  $("panel-toggle").focus();
  return true;
}
$("panel-toggle").onclick = () => $("panel-toggle").setAttribute("aria-expanded", String($("panel").classList.toggle("open")));

function showView() {
  for (const view of ["text", "tokens"]) $(`view-${view}`).setAttribute("aria-pressed", String(settings.view === view));
  document.body.classList.toggle("shows-tokens", settings.view === "tokens");
}
for (const view of ["text", "tokens"]) $(`view-${view}`).onclick = () => {
  settings.view = view;
  saveSettings();
  showView();
  drawAll();
};

showView();
drawAll();
$("log").scrollTop = $("log").scrollHeight;
drawChats();
showFigures(lastAnswer());
connect();
if (matchMedia("(hover: hover)").matches) $("input").focus();
