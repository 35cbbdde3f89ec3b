// Figures of an answer: in the strip above the chat, and in the panel.

import { $, ORIGINS, el, live, percent, settings } from "./state.js";
import { acts } from "./request.js";

// How many times as fast as plain decoding an answer was: as its race has measured it, else as the server estimates it.
export function timesPlain(turn) {
  const measured = turn.race && turn.race.speedup, estimated = turn.stats && turn.stats.speedup_over_plain;
  if (measured) return { value: measured, isMeasured: true };
  return estimated ? { value: estimated, isMeasured: false } : null;
}

export const timesText = (times) => times.isMeasured ? `${times.value.toFixed(2)} x plain` : `about ${times.value.toFixed(1)} x plain`;

export function showFigures(turn) {
  const s = turn && turn.stats, rate = turn && turn.rate || 0, times = turn && timesPlain(turn);
  $("rate").textContent = rate.toFixed(rate && rate < 10 ? 1 : 0);
  $("strip-rate").textContent = `${$("rate").textContent} tokens/s`;
  $("strip-rate").hidden = !rate;
  $("strip-times").textContent = times ? timesText(times) : "";
  $("strip-times").title = !times ? "" : times.isMeasured ? "Measured: drafted and plain decoding took turns" : "Estimated from what a pass and a draft cost here";
  $("strip-times").hidden = !times;
  $("per-pass").textContent = s && s.num_target_passes ? ((s.num_tokens - 1) / s.num_target_passes).toFixed(2) : "–";
  $("acceptance").textContent = s && s.num_drafts ? percent(s.acceptance_rate) : "–";
  showRace(turn);
  showMix(turn);
  showSpark();
}

export function showRace(turn) {
  const plain = turn && turn.plain, times = turn && timesPlain(turn);
  $("versus").hidden = !plain;
  if (plain) {
    const best = Math.max(turn.rate, plain.rate, 1e-9);
    for (const [name, lane] of [["spec", turn], ["plain", plain]]) {
      $(`bar-${name}`).style.width = `${lane.rate / best * 100}%`;
      $(`num-${name}`).textContent = lane.rate ? lane.rate.toFixed(1) : "–";
    }
  }
  const verdict = $("verdict"), own = live.card && live.card.hopskip;
  if (times) verdict.replaceChildren(el("strong", "", `${times.value.toFixed(times.isMeasured ? 2 : 1)} times plain decoding`), verdictOf(turn, times));
  else if (own && !acts.race(own, settings)) verdict.textContent = settings.enabled ? "This server has room for one answer at a time, so there is no race." : "Nothing is drafted.";
  else verdict.textContent = settings.race ? "Each answer is decoded twice: with drafts, and plainly." : "“Race plain decoding” below measures it.";
}

function verdictOf(turn, times) {
  if (!times.isMeasured) return ", estimated from what a pass and a draft cost here. “Race plain decoding” below measures it.";
  if (!turn.finish || !turn.plain.finish) return " so far.";
  const texts = !turn.isGreedy ? "Both texts are samples of the same distribution." : turn.text === turn.plain.text ? "The texts are the same." : "The texts differ.";
  return `. ${texts} The two took turns on this machine until one had ended; counted is the time of decoding alone, so other work slows both alike.`;
}

function showMix(turn) {
  const counts = {}, tokens = turn && turn.tokens || [];
  for (const token of tokens) counts[token.o] = (counts[token.o] || 0) + 1;
  $("mix").replaceChildren();
  $("legend").replaceChildren();
  for (const [origin, name] of Object.entries(ORIGINS)) {
    if (!counts[origin] && !canComeFrom(origin)) continue;
    const share = (counts[origin] || 0) / Math.max(1, tokens.length), part = el("i", `k-${origin}`), item = el("li");
    part.style.width = `${share * 100}%`;
    if (share) $("mix").append(part);
    item.append(el("i", `k-${origin}`), el("span", "", name), el("b", "", tokens.length ? percent(share) : ""));
    $("legend").append(item);
  }
}

// What the server's draft allows. With `auto` an exit's tokens join the list when they come.
function canComeFrom(origin) {
  const { draft, exit_layer } = live.card ? live.card.hopskip : { draft: "none", exit_layer: null };
  if (origin === "target") return true;
  if (origin === "bonus") return draft !== "none";
  if (draft === "auto") return origin === "ngram";
  return draft === origin || draft === "both" && (origin === "ngram" || origin === (exit_layer === null ? "exit-branch" : "early-exit"));
}

function showSpark() {
  const top = Math.max(...live.rates.slice(-400), 1e-9), step = 100 / Math.max(live.rates.length - 1, 1);
  const line = live.rates.map((r, i) => `${i ? "L" : "M"}${(i * step).toFixed(2)} ${(38 - r / top * 34).toFixed(2)}`).join("");
  $("spark").querySelector(".line").setAttribute("d", line);
  $("spark").querySelector(".fill").setAttribute("d", line ? `${line}L100 40L0 40Z` : "");
}
