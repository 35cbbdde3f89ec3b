// anthropic-sdk-typescript.
import Anthropic from "@anthropic-ai/sdk";
import { CITY, HISTORY, KEY, MODEL, ROOT, TOO_LONG, argumentsOk, check, fails, ok, report } from "./common.mjs";

const client = new Anthropic({ baseURL: ROOT, apiKey: KEY, maxRetries: 0 });
const TOOLS = [{ name: "weather", description: "The weather of a city", input_schema: CITY }];
const base = { model: MODEL, max_tokens: 200, system: "You are brief.", messages: HISTORY.slice(1), temperature: 0 };
const ask = (options) => client.messages.create({ ...base, ...options });

check("text", "", async () => ok((await ask({ max_tokens: 40 })).content[0].text));

check("stream", "", async () => {
  const stream = client.messages.stream({ ...base, max_tokens: 40 });
  let text = "";
  stream.on("text", (piece) => (text += piece));
  ok((await stream.finalMessage()).content[0].text === text && text, text);
});

check("tools", "", async () => {
  const asked = { tools: TOOLS, tool_choice: { type: "any" } };
  argumentsOk((await ask(asked)).content[0].input);
  argumentsOk((await client.messages.stream({ ...base, ...asked }).finalMessage()).content[0].input);
});

check("schema", "", async () => {
  argumentsOk((await ask({ output_config: { format: { type: "json_schema", schema: CITY } } })).content[0].text);
});

check("errors", "", async () => {
  ok((await fails(() => ask({ model: "nobody" }))) instanceof Anthropic.NotFoundError);
  const stranger = new Anthropic({ baseURL: ROOT, apiKey: "wrong-secret", maxRetries: 0 });
  ok((await fails(() => stranger.messages.create(base))) instanceof Anthropic.AuthenticationError);
  const error = await fails(() => ask({ messages: [{ role: "user", content: TOO_LONG }] }));
  ok(error.error?.error?.type === "invalid_request_error", error);
});

check("history", "", async () => {
  const answer = await ask({ tools: TOOLS, tool_choice: { type: "any" } });
  const results = answer.content
    .filter((block) => block.type === "tool_use")
    .map((block) => ({ type: "tool_result", tool_use_id: block.id, content: "Rain" }));
  const said = [
    { role: "assistant", content: answer.content },
    { role: "user", content: results },
  ];
  ok((await ask({ messages: [...base.messages, ...said], tools: TOOLS, max_tokens: 5 })).role === "assistant");
});

await report("@anthropic-ai/sdk");
