// The chats that this browser keeps: a list of titles, and each chat under a name of its own.

import { live, notice } from "./state.js";

const LIST = "hopskip.chats", CHAT = "hopskip.chat.", OPEN = "hopskip.open", TITLE_LENGTH = 60;

// Titles, the latest first. Another window may have changed them, so they are read anew each time.
export function listChats() {
  const kept = read(LIST);
  return (Array.isArray(kept) ? kept : []).filter((c) => c && typeof c.id === "string" && typeof c.title === "string").sort((a, b) => b.updated - a.updated);
}

export const newChat = () => ({ id: crypto.getRandomValues(new Uint32Array(2)).join("-"), title: "", isNamed: false, turns: [] });

// The chat of this id; a new one if it is gone or cannot be read.
export function openChat(id) {
  const kept = id && read(CHAT + id), listed = listChats().find((c) => c.id === id);
  if (!listed || !Array.isArray(kept) || !kept.every((t) => t && typeof t.text === "string" && ["user", "assistant"].includes(t.role))) return newChat();
  return { ...listed, turns: kept };
}

// The one that was open before a reload.
export function lastOpen() {
  try { return sessionStorage.getItem(OPEN); } catch { return null; }
}

export function rememberOpen(chat) {
  try { sessionStorage.setItem(OPEN, chat.id); } catch { /* a reload begins a new chat then */ }
}

// Keep a chat. Where there is no room, what is only looked at goes first: alternatives, then origins of tokens.
export function saveChat(chat) {
  if (!chat.turns.length) return;
  if (!chat.isNamed) chat.title = titleOf(chat.turns[0].text);
  const { id, title, isNamed } = chat;
  const list = [{ id, title, isNamed, updated: Date.now() }, ...listChats().filter((c) => c.id !== id)];
  const ways = [() => chat.turns, () => chat.turns.map(withoutAlternatives), () => slimOthers(id) && chat.turns.map(withoutAlternatives), () => chat.turns.map(withoutTokens)];
  for (const turns of ways) {
    try {
      localStorage.setItem(CHAT + id, JSON.stringify(turns()));
      localStorage.setItem(LIST, JSON.stringify(list));
      notice("");
      return;
    } catch { /* full: try with less */ }
  }
  notice("This browser has no room for the chat, so a reload will lose what is new. Delete some chats, or save this one as a file.");
}

export function renameChat(id, title) {
  const list = listChats(), named = title.trim().slice(0, 200);
  for (const chat of [live.chat, list.find((c) => c.id === id)]) if (chat && chat.id === id && named) Object.assign(chat, { title: named, isNamed: true });
  write(LIST, list);
}

export function deleteChat(id) {
  write(LIST, listChats().filter((c) => c.id !== id));
  try { localStorage.removeItem(CHAT + id); } catch { /* nothing was kept */ }
}

export function titleOf(question) {
  const line = question.trim().split("\n")[0], letters = [...line];
  return letters.length > TITLE_LENGTH ? `${letters.slice(0, TITLE_LENGTH).join("").trimEnd()}…` : line;
}

const withoutAlternatives = (turn) => ({ ...turn, tokens: turn.tokens && turn.tokens.map((t) => ({ ...t, top: [] })), plain: turn.plain && withoutAlternatives(turn.plain) });
const withoutTokens = (turn) => ({ ...turn, tokens: turn.tokens && [], plain: turn.plain && withoutTokens(turn.plain) });

function slimOthers(id) {
  for (const other of listChats().filter((c) => c.id !== id)) {
    const turns = read(CHAT + other.id);
    if (Array.isArray(turns)) write(CHAT + other.id, turns.map(withoutTokens));
  }
  return true;
}

function read(name) {
  try { return JSON.parse(localStorage.getItem(name)); } catch { return null; }
}

function write(name, value) {
  try { localStorage.setItem(name, JSON.stringify(value)); } catch { notice("This browser keeps nothing more: its room for this page is full, or pages may keep nothing."); }
}
