// The panel's controls. Each is shown where its setting acts on this server, and nowhere else.

import { lastAnswer } from "./conversation.js";
import { showRace } from "./figures.js";
import { acts, fitted, mostTokens } from "./request.js";
import { $, live, saveSettings, settings } from "./state.js";

const CHECKS = ["enabled", "race", "alternatives", "own"], RANGES = ["k", "exit", "temperature", "max"];

export function showControls() {
  const { card } = live;
  document.querySelectorAll("[data-control]").forEach((node) => { node.hidden = !card || !acts[node.dataset.control](card.hopskip, settings); });
  document.querySelectorAll(".drafts").forEach((node) => { node.hidden = !card || !acts.enabled(card.hopskip); });
  if (!card) return;
  const own = card.hopskip, fit = fitted(card, settings);
  $("k").max = own.num_draft_tokens || 1;
  $("exit").max = own.num_hidden_layers - 1;
  $("max").max = mostTokens(card);
  for (const id of CHECKS) $(id).checked = settings[id];
  for (const id of RANGES) $(id).value = fit[id];
  if (document.activeElement !== $("system")) $("system").value = settings.system;
  $("out-k").textContent = fit.k;
  $("out-exit").textContent = `${fit.exit} of ${own.num_hidden_layers}`;
  $("out-temperature").textContent = settings.temperature ? settings.temperature.toFixed(1) : "0, greedy";
  $("out-own").textContent = acts.own(own) ? ` (${Object.entries(own.recommended_sampling).map(([name, value]) => `${name.replace("_", "-")} ${value}`).join(", ")})` : "";
  $("out-max").textContent = fit.max;
  $("input").placeholder = own.has_chat_template ? "Write a message" : "Begin a text, and the model goes on";
  showRace(lastAnswer());
}

function change(name, value) {
  settings[name] = value;
  saveSettings();
  showControls();
}

for (const id of CHECKS) $(id).addEventListener("change", () => change(id, $(id).checked));
for (const id of RANGES) $(id).addEventListener("input", () => change(id, Number($(id).value)));
$("system").addEventListener("input", () => change("system", $("system").value));
