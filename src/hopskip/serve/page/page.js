// The page: connects to the server, and answers to buttons, keys and settings.

import { ask, draw, showButtons } from "./conversation.js";
import { showFigures, showVerdict } from "./figures.js";
import { $, applyTheme, canChooseExit, live, save, state } from "./state.js";
import { hideTip } from "./tokens.js";

async function connect() {
  try {
    const answer = await fetch("v1/models");
    if (!answer.ok) throw new Error(`the server answers ${answer.status}`);
    live.card = (await answer.json()).data[0];
    $("model").textContent = live.card.id;
    $("dot").className = "dot ok";
    $("status").title = `${live.card.hopskip.num_hidden_layers} layers, context ${live.card.max_model_len}, draft ${live.card.hopskip.draft}`;
  } catch (error) {
    $("model").textContent = "not reachable";
    $("dot").className = "dot bad";
    setTimeout(connect, 3000);
  }
  showSettings();
}

function showSettings() {
  const s = state.settings, own = live.card && live.card.hopskip;
  if (own && own.draft !== "none") {
    $("k").max = own.num_draft_tokens;
    s.k = Math.min(Math.max(1, s.k || own.num_draft_tokens), own.num_draft_tokens);
    $("exit").max = own.num_hidden_layers - 1;
    s.exit = canChooseExit() ? Math.min(Math.max(1, s.exit || own.exit_layer), own.num_hidden_layers - 1) : own.exit_layer;
  }
  if (live.card) $("max").max = Math.max(16, Math.min(2048, Math.floor(live.card.max_model_len / 2)));
  for (const id of ["enabled", "race", "colours"]) $(id).checked = s[id];
  for (const id of ["k", "exit", "temperature", "max", "system"]) if (s[id] !== null && document.activeElement !== $(id)) $(id).value = s[id];
  const drafts = own && own.draft !== "none" && s.enabled;
  $("enabled").disabled = !own || own.draft === "none";
  $("k").disabled = !drafts; $("field-k").classList.toggle("off", !drafts);
  $("exit").disabled = !drafts || !canChooseExit(); $("field-exit").classList.toggle("off", !drafts || !canChooseExit());
  $("why-exit").textContent = !own || canChooseExit() ? "" : own.draft === "none" ? "This server does not draft." : own.draft === "ngram" ? "This server drafts by n-gram lookup, which runs no layers." : "Fixed by this server’s draft.";
  $("race").disabled = !drafts;
  $("out-k").textContent = own ? s.k || "" : ""; $("out-exit").textContent = own && s.exit ? `${s.exit} of ${own.num_hidden_layers}` : "";
  $("out-temperature").textContent = s.temperature ? s.temperature.toFixed(1) : "0, greedy"; $("out-max").textContent = s.max;
  $("log").classList.toggle("colours", s.colours);
  showButtons();
}

for (const id of ["enabled", "race", "colours"]) $(id).addEventListener("change", () => { state.settings[id] = $(id).checked; save(); showSettings(); showVerdict(state.turns[state.turns.length - 1], (state.turns[state.turns.length - 1] || {}).plain); });
for (const id of ["k", "exit", "temperature", "max"]) $(id).addEventListener("input", () => { state.settings[id] = Number($(id).value); save(); showSettings(); });
$("system").addEventListener("input", () => { state.settings.system = $("system").value; save(); });

function grow() {
  const input = $("input");
  input.style.height = "auto";
  input.style.height = `${input.scrollHeight}px`;
  showButtons();
}

$("input").addEventListener("input", grow);
$("input").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); if (!live.running) submit(); }
});
$("form").addEventListener("submit", (event) => { event.preventDefault(); if (live.running) live.running.abort.abort(); else submit(); });
function submit() {
  const text = $("input").value.trim();
  if (!text || !live.card) return;
  $("input").value = "";
  grow();
  ask(text);
}
function clear() {
  if (live.running) live.running.abort.abort();
  state.turns = [];
  live.rates = [];
  save();
  draw();
  showFigures(null);
  $("input").focus();
}
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") { if (live.running) live.running.abort.abort(); hideTip(); closePanel(); }
  if (event.key === "O" && event.ctrlKey && event.shiftKey) { event.preventDefault(); clear(); }
});
$("new").onclick = clear;
$("theme").onclick = () => { state.theme = document.documentElement.dataset.theme === "dark" ? "light" : "dark"; applyTheme(); save(); };
function closePanel() { $("panel").classList.remove("open"); $("panel-toggle").setAttribute("aria-expanded", "false"); }
$("panel-toggle").onclick = () => $("panel-toggle").setAttribute("aria-expanded", String($("panel").classList.toggle("open")));

draw();
$("log").scrollTop = $("log").scrollHeight;
showSettings();
showFigures(state.turns.filter((t) => t.role === "assistant").pop() || null);
connect();
if (innerWidth > 940) $("input").focus();
