// The AI SDK: its default provider, which asks for responses, and the compatible one, which asks for chats.
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { APICallError, generateText, jsonSchema, Output, stepCountIs, streamText, tool } from "ai";
import { z } from "zod";
import { CITY, HISTORY, KEY, MODEL, QUESTION, TOO_LONG, URL, argumentsOk, check, fails, ok, report } from "./common.mjs";

const responses = createOpenAI({ baseURL: URL, apiKey: KEY });
const compatible = createOpenAICompatible({
  name: "hopskip",
  baseURL: URL,
  apiKey: KEY,
  supportsStructuredOutputs: true,
  includeUsage: true,
});
const Trip = z.object({ city: z.enum(["Paris", "Rome"]), days: z.number().int().min(1).max(9) });
const weather = tool({
  description: "The weather of a city",
  inputSchema: jsonSchema(CITY),
  execute: async () => "Rain",
});

for (const [row, model] of [
  ["responses", responses(MODEL)],
  ["compatible", compatible(MODEL)],
]) {
  const base = { model, temperature: 0, maxRetries: 0, maxOutputTokens: 40 };
  const calls = { ...base, prompt: QUESTION, tools: { weather }, toolChoice: "required", maxOutputTokens: 200 };

  check("text", row, async () => {
    const answer = await generateText({ ...base, messages: HISTORY.slice(1), system: "You are brief." });
    ok(answer.text && answer.usage.outputTokens > 0, answer.usage);
  });

  check("stream", row, async () => {
    const stream = streamText({ ...base, prompt: QUESTION });
    let text = "";
    for await (const piece of stream.textStream) text += piece;
    ok(text && text === (await stream.text), text);
    ok((await stream.usage).outputTokens > 0);
  });

  check("tools", row, async () => {
    const answer = await generateText(calls);
    argumentsOk(answer.toolCalls[0].input);
    const stream = streamText(calls);
    argumentsOk((await stream.toolCalls)[0].input);
  });

  check("schema", row, async () => {
    const answer = await generateText({
      ...base,
      prompt: QUESTION,
      maxOutputTokens: 200,
      experimental_output: Output.object({ schema: Trip }),
    });
    argumentsOk(answer.experimental_output);
  });

  check("errors", row, async () => {
    const error = await fails(() => generateText({ ...base, prompt: TOO_LONG }));
    ok(APICallError.isInstance(error) && error.statusCode === 400, error);
  });

  check("history", row, async () => {
    // two steps: the call is fed back with its result, as the SDK keeps it
    const forced = ({ stepNumber }) => ({ toolChoice: stepNumber === 0 ? "required" : "none" });
    const answer = await generateText({ ...calls, prepareStep: forced, stopWhen: stepCountIs(2) });
    ok(answer.steps.length === 2, answer.steps.length, answer.finishReason);
    const messages = [{ role: "user", content: QUESTION }, ...answer.response.messages, HISTORY[1]];
    ok((await generateText({ ...base, messages })).finishReason);
  });
}

await report("ai", "@ai-sdk/openai", "@ai-sdk/openai-compatible");
