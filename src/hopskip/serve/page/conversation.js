// The open chat: questions are asked, answers come, are stopped, tried again, or asked for anew with another question.

import { lastOpen, newChat, openChat, rememberOpen, saveChat } from "./chats.js";
import { showFigures } from "./figures.js";
import { acts, requestOf } from "./request.js";
import { ServerError, generate, newLane } from "./server.js";
import { $, announce, el, live, settings } from "./state.js";
import { hideTip } from "./tokens.js";
import { answerNode, editNode, questionNode } from "./turn.js";

const IDEAS = [
  ["Rewrite something", "copies are drafted from the prompt", "Rewrite this in the past tense, changing nothing else: The fox jumps over the dog. The dog sleeps in the sun. The sun shines on the fox and the dog all day."],
  ["Count", "patterns are easy to draft", "Count from 1 to 40, one number on each line."],
  ["Explain", "new text: mostly the model itself", "Explain in a few sentences why the sky is blue."],
  ["Write code", "somewhere in between", "Write a Python class for a stack with push, pop, peek and a length, with docstrings."],
];
const NEAR_THE_END = 160;  // pixels: who has scrolled up further than this is reading

export const hooks = { onChange: () => {}, onRefused: () => {}, onLost: () => {} };  // of the list of chats, and of the connection

live.chat = openChat(lastOpen());
rememberOpen(live.chat);

export const lastAnswer = () => live.chat.turns.filter((t) => t.role === "assistant").pop() || null;

export function stop() {
  const { running } = live;
  if (!running) return;
  live.running = null;
  running.turn.stopped = true;
  running.abort.abort();
}

export function show(chat) {
  stop();
  live.chat = chat;
  live.rates = [];
  rememberOpen(chat);
  drawAll();
  $("log").scrollTop = $("log").scrollHeight;
  showFigures(lastAnswer());
  showRunning("");
  hooks.onChange();
}

export const startNew = () => show(newChat());

export async function ask(text) {
  live.chat.turns.push({ role: "user", text });
  await answerLast();
}

async function retry() {
  if (live.running || !live.card) return;
  live.chat.turns.pop();
  await answerLast();
}

// The chat goes on from another question; what had followed is gone.
async function editAndAsk(index, text) {
  stop();
  live.chat.turns.splice(index, Infinity, { role: "user", text });
  await answerLast();
}

async function answerLast() {
  const chat = live.chat, request = requestOf(live.card, settings, chat.turns);
  const isRace = acts.enabled(live.card.hopskip) && Boolean(request.body.speculative && request.body.speculative.race);
  const turn = { role: "assistant", ...newLane(), isGreedy: isGreedy(request.body) };
  if (isRace) turn.plain = newLane();
  const running = { abort: new AbortController(), turn };
  chat.turns.push(turn);
  live.running = running;
  live.rates = [];
  saveChat(chat);
  drawAll();
  $("log").scrollTop = $("log").scrollHeight;
  showRunning("Answering");
  hooks.onChange();
  try {
    await generate(request, [turn, turn.plain], running.abort.signal, (lane, fresh) => {
      if (live.running !== running) return;
      if (lane === turn && turn.rate) live.rates.push(turn.rate);
      $("log").lastElementChild.grow(lane, fresh);
      showFigures(turn);
      follow();
    });
  } catch (error) {
    fail(turn, error);
  }
  if (live.running === running) live.running = null;
  saveChat(chat);
  hooks.onChange();
  if (live.chat !== chat || live.running) return;
  hideTip();
  $("log").lastElementChild.replaceWith(answerNode(turn, true, retry));
  follow();
  showFigures(turn);
  showRunning(turn.error ? "" : turn.stopped ? "Stopped" : `Answer: ${turn.text}`);
  if (document.activeElement === document.body && matchMedia("(hover: hover)").matches) $("input").focus();
}

function isGreedy(body) {
  return (body.temperature ?? live.card.hopskip.recommended_sampling.temperature ?? 1) === 0;
}

function fail(turn, error) {
  if (turn.stopped) return;
  if (!(error instanceof ServerError)) throw error;
  turn.error = error.message;
  if (error.status === 401) hooks.onRefused();
  else if (error.status === 0) hooks.onLost();
}

function follow() {
  requestAnimationFrame(() => {
    const log = $("log");
    if (log.scrollHeight - log.scrollTop - log.clientHeight < NEAR_THE_END) log.scrollTop = log.scrollHeight;
  });
}

export function drawAll() {
  hideTip();
  const { turns } = live.chat, place = $("log").scrollTop;
  $("log").replaceChildren(...(turns.length ? turns.map(turnNode) : [emptyNode()]));
  $("log").scrollTop = place;
}

function turnNode(turn, index) {
  if (turn.role === "assistant") return answerNode(turn, index === live.chat.turns.length - 1, retry);
  return questionNode(turn, () => edit(turn, index));
}

function edit(turn, index) {
  if (live.running || !live.card) return;
  const node = editNode(turn, (text) => {
    if (text === null) {
      const question = turnNode(turn, index);
      node.replaceWith(question);
      question.querySelector("button").focus();
    } else editAndAsk(index, text);
  });
  $("log").children[index].replaceWith(node);
  node.querySelector("textarea").focus();
}

function emptyNode() {
  const empty = el("div", "empty"), ideas = el("div", "ideas");
  empty.append(el("h2", "", "See who wrote every token"), el("p", "", "A draft is cheap, and the whole model checks it. The text is what the whole model would have written, only sooner."));
  for (const [title, note, prompt] of IDEAS) {
    const button = el("button");
    button.append(el("b", "", title), el("span", "", note));
    button.onclick = () => { if (!live.running && live.card) ask(prompt); };
    ideas.append(button);
  }
  empty.append(ideas);
  return empty;
}

function showRunning(text) {
  announce(text);
  $("log").setAttribute("aria-busy", String(Boolean(live.running)));
  showSend();
}

export function showSend() {
  $("send").textContent = live.running ? "Stop" : "Send";
  $("send").classList.toggle("stop", Boolean(live.running));
  $("send").disabled = !live.running && (!live.card || !$("input").value.trim());
}
