// What drivers in JavaScript share: see common.py.
import { readFileSync } from "node:fs";

export const URL = process.env.CLIENTS_URL;
export const ROOT = URL.replace(/\/v1$/, "");
export const KEY = process.env.CLIENTS_KEY;
export const MODEL = process.env.CLIENTS_MODEL;
export const QUESTION = "Name three colours.";
export const HISTORY = [
  { role: "system", content: "You are brief." },
  { role: "user", content: "Hi" },
  { role: "assistant", content: "Hello!" },
  { role: "user", content: QUESTION },
];
export const CITY = {
  type: "object",
  properties: {
    city: { type: "string", enum: ["Paris", "Rome"] },
    days: { type: "integer", minimum: 1, maximum: 9 },
  },
  required: ["city", "days"],
};
export const TOO_LONG = "word ".repeat(20000);

const checks = [];

export function check(capability, row, run) {
  checks.push({ capability, row, run });
}

export function ok(value, ...about) {
  if (!value) throw new Error(`it does not hold: ${JSON.stringify(about)}`);
}

export function argumentsOk(given) {
  const value = typeof given === "string" ? JSON.parse(given) : given;
  ok(["Paris", "Rome"].includes(value.city) && value.days >= 1 && value.days <= 9, given);
}

export async function fails(run) {
  let result;
  try {
    result = await run();
  } catch (error) {
    return error;
  }
  throw new Error(`nothing was thrown, but ${JSON.stringify(result)} returned`);
}

export async function report(...packages) {
  const results = [];
  for (const { capability, row, run } of checks) {
    let error = null;
    try {
      await run();
    } catch (failure) {
      console.error(failure);
      error = `${failure?.name}: ${failure?.message}`.slice(0, 500);
    }
    results.push({ row, capability, error });
  }
  const version = (name) =>
    JSON.parse(readFileSync(new globalThis.URL(`node_modules/${name}/package.json`, import.meta.url))).version;
  const versions = Object.fromEntries(packages.map((name) => [name, version(name)]));
  console.log(JSON.stringify({ versions, results }));
}
