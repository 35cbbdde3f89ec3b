// Which settings act, given how the server drafts, and the request that they make. A control is shown where its setting acts.

export const acts = {
  enabled: (own) => own.draft !== "none",
  k: (own, s) => acts.enabled(own) && s.enabled && own.num_draft_tokens > 1,
  exit: (own, s) => acts.enabled(own) && s.enabled && ["early-exit", "both"].includes(own.draft) && own.exit_layer !== null && own.verify !== "reuse" && own.num_hidden_layers > 2,
  race: (own, s) => acts.enabled(own) && s.enabled && own.max_num_seqs > 1,
  own: (own) => Object.keys(own.recommended_sampling || {}).length > 0,
  temperature: (own, s) => !(acts.own(own) && s.own),
  max: () => true,
  alternatives: () => true,
  system: (own) => own.has_chat_template,
};

// Settings within what the server allows.
export function fitted(card, s) {
  const own = card.hopskip, within = (value, usual, most) => Math.min(Math.max(1, value || usual || 1), most);
  return { ...s, k: within(s.k, own.num_draft_tokens, own.num_draft_tokens || 1), exit: within(s.exit, own.exit_layer, own.num_hidden_layers - 1), max: Math.min(s.max, mostTokens(card)) };
}

export const mostTokens = (card) => Math.max(16, Math.min(4096, Math.floor(card.max_model_len / 2)));

// Path and body of a request; `turns` ends with the question.
export function requestOf(card, s, turns) {
  const own = card.hopskip, is = (name) => acts[name](own, s), fit = fitted(card, s);
  const body = { model: card.id, stream: true, return_tokens: s.alternatives ? true : "origins", max_tokens: fit.max };
  if (is("temperature")) body.temperature = s.temperature;  // else as the model's makers recommend
  if (is("enabled")) {
    const speculative = {};
    if (!s.enabled) speculative.enabled = false;
    if (is("k") && fit.k < own.num_draft_tokens) speculative.num_draft_tokens = fit.k;
    if (is("exit")) speculative.exit_layer = fit.exit;
    if (is("race") && s.race) speculative.race = true;
    if (Object.keys(speculative).length) body.speculative = speculative;
  }
  if (!own.has_chat_template) return { path: "v1/completions", body: { ...body, prompt: turns[turns.length - 1].text } };
  const messages = messagesOf(turns);
  if (s.system) messages.unshift({ role: "system", content: s.system });
  return { path: "v1/chat/completions", body: { ...body, messages } };
}

// A question that has got no answer is left out, unless it is the one asked now: templates want roles in turn.
function messagesOf(turns) {
  return turns.filter((turn, i) => turn.role === "assistant" ? turn.text : i === turns.length - 1 || (turns[i + 1] || {}).text).map((turn) => ({ role: turn.role, content: turn.text }));
}
