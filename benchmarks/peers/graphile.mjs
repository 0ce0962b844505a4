// graphile-worker, as its page on performance advises for many quick jobs: a local queue, completion in batches.
import { Logger, makeWorkerUtils, run } from "graphile-worker";
import { addForEachLine, called, chunks, command, count, say, url } from "./harness.mjs";

const logger = new Logger(() => () => {});

if (command === "work") {
  await run({
    preset: {
      worker: {
        connectionString: url,
        concurrentJobs: 24,
        maxPoolSize: 25,
        // A local queue is for throughput; its page on performance says that it costs latency.
        ...(count > 0 ? { localQueue: { size: 500 }, completeJobBatchDelay: 0, failJobBatchDelay: 0 } : {}),
        logger,
      },
    },
    taskList: { noop: async () => called(count) },
  });
} else {
  const utils = await makeWorkerUtils({ connectionString: url, logger });
  if (command === "install") await utils.migrate();
  if (command === "fill") {
    for (const some of chunks(count, 5000)) {
      await utils.addJobs(some.map((n) => ({ identifier: "noop", payload: { n } })));
    }
  }
  if (command === "add") await addForEachLine((n) => utils.addJob("noop", { n }));
  await utils.release();
  say("done");
}
