// What the harnesses in JavaScript share. They do as they are told (install | fill N | work N | add) and
// say what happens, one JSON object a line. `work 0` says every call; `add` adds a job for each line it reads.
import readline from "node:readline";

let calls = 0;

export function say(event) {
  const cpu = process.cpuUsage();
  console.log(JSON.stringify({ event, at: (performance.timeOrigin + performance.now()) / 1000, cpu: (cpu.user + cpu.system) / 1e6 }));
}

export function called(count) {
  calls += 1;
  if (count === 0) say("start");
  else if (calls === 1) say("first");
  if (calls === count) say("last");
}

export async function addForEachLine(add) {
  say("ready");
  for await (const line of readline.createInterface({ input: process.stdin })) {
    await add(Number(line));
    say("added");
  }
}

export function* chunks(count, size) {
  for (let from = 0; from < count; from += size) {
    yield Array.from({ length: Math.min(size, count - from) }, (_, n) => from + n);
  }
}

export const [url, command, count] = [process.argv[2], process.argv[3], Number(process.argv[4] ?? 0)];
