// openai-node: chats and responses.
import OpenAI from "openai";
import { zodResponseFormat, zodTextFormat } from "openai/helpers/zod";
import { z } from "zod";
import { CITY, HISTORY, KEY, MODEL, QUESTION, TOO_LONG, URL, argumentsOk, check, fails, ok, report } from "./common.mjs";

const client = new OpenAI({ baseURL: URL, apiKey: KEY, maxRetries: 0 });
const Trip = z.object({ city: z.enum(["Paris", "Rome"]), days: z.number().int().min(1).max(9) });
const WEATHER = { name: "weather", description: "The weather of a city", parameters: CITY };
const TOOLS = [{ type: "function", function: WEATHER }];
const FUNCTIONS = [{ type: "function", ...WEATHER, strict: null }];
const base = { model: MODEL, messages: HISTORY, temperature: 0 };
const ask = (options) => client.chat.completions.create({ ...base, max_tokens: 40, ...options });
const respond = (options) =>
  client.responses.create({ model: MODEL, input: QUESTION, temperature: 0, max_output_tokens: 200, ...options });

check("text", "chat", async () => ok((await ask({ store: true })).choices[0].message.content));

check("stream", "chat", async () => {
  let text = "";
  for await (const chunk of await ask({ stream: true })) text += chunk.choices[0].delta.content ?? "";
  ok(text === (await ask({})).choices[0].message.content, text);
});

check("tools", "chat", async () => {
  const answer = await client.chat.completions.create({ ...base, tools: TOOLS, tool_choice: "required" });
  argumentsOk(answer.choices[0].message.tool_calls[0].function.arguments);
  const stream = client.chat.completions.stream({ ...base, tools: TOOLS, tool_choice: "required" });
  argumentsOk((await stream.finalMessage()).tool_calls[0].function.arguments);
});

check("schema", "chat", async () => {
  const parsed = await client.chat.completions.parse({ ...base, response_format: zodResponseFormat(Trip, "trip") });
  argumentsOk(parsed.choices[0].message.parsed);
});

check("errors", "chat", async () => {
  ok((await fails(() => ask({ model: "nobody" }))) instanceof OpenAI.NotFoundError);
  const stranger = new OpenAI({ baseURL: URL, apiKey: "wrong-secret", maxRetries: 0 });
  ok((await fails(() => stranger.models.list())) instanceof OpenAI.AuthenticationError);
  const error = await fails(() => ask({ messages: [{ role: "user", content: TOO_LONG }] }));
  ok(error.code === "context_length_exceeded", error);
});

check("history", "chat", async () => {
  const message = await client.chat.completions
    .stream({ ...base, tools: TOOLS, tool_choice: "required" })
    .finalMessage();
  const results = message.tool_calls.map((call) => ({ role: "tool", tool_call_id: call.id, content: "Rain" }));
  const said = await client.chat.completions.stream({ ...base, max_tokens: 5 }).finalMessage();
  ok((await ask({ messages: [...HISTORY, message, ...results], tools: TOOLS, max_tokens: 5 })).choices.length);
  ok((await ask({ messages: [...HISTORY, said, HISTORY[1]], max_tokens: 5 })).choices.length);
});

check("text", "responses", async () => ok((await respond({ instructions: "Be brief." })).output_text));

check("stream", "responses", async () => {
  const stream = client.responses.stream({ model: MODEL, input: QUESTION, temperature: 0, max_output_tokens: 40 });
  let text = "";
  stream.on("response.output_text.delta", (event) => (text += event.delta));
  ok((await stream.finalResponse()).output_text === text && text, text);
});

check("tools", "responses", async () => {
  argumentsOk((await respond({ tools: FUNCTIONS, tool_choice: "required" })).output[0].arguments);
});

check("schema", "responses", async () => {
  const asked = { model: MODEL, input: QUESTION, text: { format: zodTextFormat(Trip, "trip") }, temperature: 0 };
  argumentsOk((await client.responses.parse(asked)).output_parsed);
});

check("errors", "responses", async () => {
  ok((await fails(() => client.responses.retrieve("resp_nobody"))) instanceof OpenAI.NotFoundError);
  ok((await fails(() => respond({ input: TOO_LONG }))).code === "context_length_exceeded");
});

check("history", "responses", async () => {
  const first = await respond({ tools: FUNCTIONS, tool_choice: "required" });
  const outputs = first.output
    .filter((item) => item.type === "function_call")
    .map((call) => ({ type: "function_call_output", call_id: call.call_id, output: "Rain" }));
  const input = [{ role: "user", content: QUESTION }, ...first.output, ...outputs];
  const again = await respond({ input, tools: FUNCTIONS, max_output_tokens: 20 });
  const kept = await respond({
    input: outputs,
    previous_response_id: first.id,
    tools: FUNCTIONS,
    max_output_tokens: 20,
  });
  ok(again.output_text === kept.output_text, again.output_text, kept.output_text);
});

await report("openai");
