// pg-boss, with batches, bursts and LISTEN/NOTIFY.
import { PgBoss } from "pg-boss";
import { addForEachLine, called, chunks, command, count, say, url } from "./harness.mjs";

const queue = "noop";
const boss = new PgBoss({ connectionString: url, useListenNotify: true, schedule: false });
boss.on("error", (error) => console.error(error));
await boss.start();

if (command === "work") {
  process.on("SIGTERM", () => boss.stop({ timeout: 5000 }).then(() => process.exit(0)));
  const options = { batchSize: 500, localConcurrency: 2, burstWhenBatchFull: true, pollingIntervalSeconds: 0.5 };
  await boss.work(queue, options, async (jobs) => {
    for (const _ of jobs) called(count);
  });
} else {
  if (command === "install") await boss.createQueue(queue, { notify: true });
  if (command === "fill") {
    for (const some of chunks(count, 5000)) {
      await boss.insert(queue, some.map((n) => ({ data: { n } })));
    }
  }
  if (command === "add") await addForEachLine((n) => boss.send(queue, { n }));
  await boss.stop();
  say("done");
}
