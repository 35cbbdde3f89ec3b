// Tokens of an answer, and a closer look at one of them.

import { $, ORIGINS, el, percent, visible } from "./state.js";

export function append(view, tokens) {
  for (const token of tokens) {
    const span = el("span", "tok", token.t);
    span.dataset.o = token.o;
    span.token = token;
    view.append(span);
  }
}

function showTip(span) {
  document.querySelectorAll(".tok.on").forEach((n) => n.classList.remove("on"));
  span.classList.add("on");
  const token = span.token, tip = $("tip");
  tip.replaceChildren();
  const head = el("div", "head");
  head.append(el("code", "", visible(token.k)), el("span", "", token.p === null ? "" : percent(Math.exp(token.p))));
  const from = el("div", "from");
  const layers = token.o === "ngram" ? "copied, no layers" : token.l === null ? "a few layers" : token.o === "target" || token.o === "bonus" ? `all ${token.l} layers` : `drafted after layer ${token.l}`;
  from.append(el("i", `k-${token.o}`), el("span", "", `${ORIGINS[token.o] || token.o}, ${layers}`));
  tip.append(head, from);
  for (const [text, logprob] of token.top) {
    const row = el("div", text === token.k ? "alt me" : "alt"), bar = el("span", "bar"), fill = el("i");
    fill.style.width = `${Math.exp(logprob) * 100}%`;
    bar.append(fill);
    row.append(el("code", "", visible(text)), bar, el("span", "", percent(Math.exp(logprob))));
    tip.append(row);
  }
  tip.hidden = false;
  const at = span.getClientRects()[0] || span.getBoundingClientRect(), size = tip.getBoundingClientRect();
  tip.style.left = `${Math.max(8, Math.min(at.left, innerWidth - size.width - 8))}px`;
  tip.style.top = `${at.bottom + size.height + 10 < innerHeight ? at.bottom + 7 : Math.max(8, at.top - size.height - 7)}px`;
}

export function hideTip() {
  $("tip").hidden = true;
  document.querySelectorAll(".tok.on").forEach((n) => n.classList.remove("on"));
}

$("log").addEventListener("mouseover", (event) => event.target.token ? showTip(event.target) : hideTip());
$("log").addEventListener("mouseleave", hideTip);
$("log").addEventListener("scroll", hideTip);
$("log").addEventListener("focusout", hideTip);
$("log").addEventListener("keydown", (event) => {
  const view = event.target.closest(".tokens"), delta = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (!view || !delta || !view.children.length) return;
  event.preventDefault();
  const tokens = [...view.children], now = tokens.findIndex((n) => n.classList.contains("on"));
  const next = now < 0 ? (delta > 0 ? 0 : tokens.length - 1) : Math.max(0, Math.min(tokens.length - 1, now + delta));
  tokens[next].scrollIntoView({ block: "nearest" });
  showTip(tokens[next]);
});
