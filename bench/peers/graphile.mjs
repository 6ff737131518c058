// graphile-worker with the settings its documentation gives for throughput: a local queue that is filled many jobs at
// a time, and completion in batches.  Jobs are done one by one; style is always "each".
import pg from 'pg';
import { Logger, run, runMigrations } from 'graphile-worker';
import { approve, LANES } from './work.mjs';

const logger = new Logger(() => () => {});

export async function fill(db, { items }) {
  const pgPool = new pg.Pool();
  pgPool.on('error', () => {});
  pgPool.on('connect', (client) => client.on('error', () => {}));
  await runMigrations({ pgPool, logger });
  await pgPool.end();
  await db.query('TRUNCATE graphile_worker._private_jobs');
  for (let from = 1; from <= items; from += 10000)
    await db.query(`SELECT count(*) FROM graphile_worker.add_jobs((SELECT array_agg(ROW('approve', json_build_object('id', g), NULL, NULL, 1, NULL, NULL, NULL)::graphile_worker.job_spec)
      FROM generate_series($1::int, $2::int) AS g))`, [from, Math.min(from + 9999, items)]);
  await db.query('VACUUM ANALYZE graphile_worker._private_jobs');
}

export async function connect() {
  const pgPool = new pg.Pool({ max: LANES + 6 });
  pgPool.on('error', () => {});
  pgPool.on('connect', (client) => client.on('error', () => {}));
  await Promise.all(Array.from({ length: LANES }, () => pgPool.query('SELECT 1')));
  return { pgPool };
}

export async function work(state, { size }) {
  state.runner = await run({
    pgPool: state.pgPool, noHandleSignals: true, parsedCronItems: [], logger,
    preset: { worker: {
      concurrentJobs: LANES + 2, pollInterval: 100, maxPoolSize: LANES + 6,
      ...(size > 1 ? { localQueue: { size }, completeJobBatchDelay: 10, failJobBatchDelay: 10 } : {}),
    } },
    taskList: { approve: (payload, helpers) => helpers.withPgClient((client) => approve(client, payload.id)) },
  });
}

export async function finished(db) {
  return (await db.query('SELECT 1 FROM graphile_worker._private_jobs LIMIT 1')).rowCount === 0;
}

export const check = () => null;

export async function close({ runner, pgPool }) {
  await runner.stop();
  await pgPool.end();
}
