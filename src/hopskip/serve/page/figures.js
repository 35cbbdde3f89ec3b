// The panel's figures: speed, acceptance, plain decoding beside it, and where tokens come from.

import { $, ORIGINS, canComeFrom, el, live, percent, state } from "./state.js";

export function showFigures(turn) {
  const s = turn && turn.stats, plain = turn && turn.plain;
  $("rate").textContent = turn && turn.rate ? turn.rate.toFixed(turn.rate < 10 ? 1 : 0) : "0";
  $("acceptance").textContent = s && s.num_drafts ? percent(s.acceptance_rate) : "–";
  $("length").textContent = s && s.num_drafts ? s.mean_acceptance_length.toFixed(2) : "–";
  const best = Math.max(turn && turn.rate || 0, plain && plain.rate || 0, 1e-9);
  $("bar-spec").style.width = `${(turn && turn.rate || 0) / best * 100}%`;
  $("bar-plain").style.width = `${(plain && plain.rate || 0) / best * 100}%`;
  $("num-spec").textContent = turn && turn.rate ? turn.rate.toFixed(1) : "–";
  $("num-plain").textContent = plain && plain.rate ? plain.rate.toFixed(1) : "–";
  showVerdict(turn, plain);
  const counts = {};
  for (const token of turn && turn.tokens || []) counts[token.o] = (counts[token.o] || 0) + 1;
  const total = Object.values(counts).reduce((a, b) => a + b, 0);
  $("mix").replaceChildren(); $("legend").replaceChildren();
  for (const [origin, name] of Object.entries(ORIGINS)) {
    if (!counts[origin] && !canComeFrom(origin)) continue;
    const share = total ? (counts[origin] || 0) / total : 0;
    const part = el("i", `k-${origin}`);
    part.style.width = `${share * 100}%`;
    if (share) $("mix").append(part);
    const item = el("li");
    item.append(el("i", `k-${origin}`), el("span", "", name), el("b", "", total ? percent(share) : ""));
    $("legend").append(item);
  }
  const top = Math.max(...live.rates, 1e-9), step = 100 / Math.max(live.rates.length - 1, 1);
  const line = live.rates.map((r, i) => `${i ? "L" : "M"}${(i * step).toFixed(2)} ${(38 - r / top * 34).toFixed(2)}`).join("");
  $("spark").querySelector(".line").setAttribute("d", line);
  $("spark").querySelector(".fill").setAttribute("d", line ? `${line}L100 40L0 40Z` : "");
}

export function showVerdict(turn, plain) {
  const verdict = $("verdict");
  if (!plain || !plain.finish || !plain.rate || !turn.rate) {
    verdict.textContent = state.settings.race ? "Each answer is decoded a second time, without drafts." : "Tick “Also decode plainly” to run each answer a second time without drafts.";
    return;
  }
  verdict.replaceChildren(el("strong", "", `${(turn.rate / plain.rate).toFixed(2)} times plain decoding`));
  const same = turn.text === plain.text;
  verdict.append(state.settings.temperature > 0 ? ". Both are samples of the same distribution." : same ? ", and the same text." : ". The texts differ.");
}
