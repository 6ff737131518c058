// pg-boss: each = its worker, with the settings its documentation gives for throughput; turn, batch = fetch(), and complete()
// in the transaction of the work.
import pg from 'pg';
import { PgBoss } from 'pg-boss';
import { approveAll, approveEach, approveInTurn, LANES, pipelined } from './work.mjs';

const QUEUE = 'approve';

async function start() {
  const boss = new PgBoss({ host: process.env.PGHOST, port: Number(process.env.PGPORT), user: process.env.PGUSER,
    database: process.env.PGDATABASE, max: 10, supervise: false, schedule: false });
  boss.on('error', (error) => console.error(error.message));
  await boss.start();
  return boss;
}

export async function fill(db, { items }) {
  const boss = await start();
  await boss.deleteQueue(QUEUE).catch(() => {});
  await boss.createQueue(QUEUE, { retryLimit: 0 });
  for (let from = 1; from <= items; from += 10000)
    await boss.insert(QUEUE, Array.from({ length: Math.min(10000, items - from + 1) }, (_, i) => ({ data: { id: from + i } })));
  await boss.stop({ graceful: false, close: true });
  await db.query('VACUUM ANALYZE pgboss.job');
}

export async function connect() {
  return { boss: await start(), pool: new pg.Pool({ max: LANES * 2 }), clients: await Promise.all([pipelined(), pipelined()]) };
}

async function loop(boss, client, size, approveJobs) {
  for (;;) {
    const jobs = await boss.fetch(QUEUE, { batchSize: size });
    if (jobs.length === 0) return;
    await approveJobs(client, jobs.map((job) => job.data.id),
      (c) => boss.complete(QUEUE, jobs.map((job) => job.id), null, { db: { executeSql: (text, values) => c.query(text, values) } }));
  }
}

export async function work({ boss, pool, clients }, { size, style }) {
  if (style !== 'each') return Promise.all(clients.map((client) => loop(boss, client, size, style === 'batch' ? approveAll : approveInTurn)));
  return boss.work(QUEUE, { batchSize: size, localConcurrency: size > 1 ? 2 : LANES, pollingIntervalSeconds: 0.5, burstWhenBatchFull: true },
    (jobs) => approveEach(pool, jobs.map((job) => job.data.id)));
}

export async function finished(db) {
  return (await db.query("SELECT 1 FROM pgboss.job WHERE name = $1 AND state < 'completed' LIMIT 1", [QUEUE])).rowCount === 0;
}

export const check = () => null;

export async function close({ boss, pool, clients }) {
  await boss.stop({ graceful: false, close: true });
  await Promise.all([...clients.map((client) => client.end()), pool.end()]);
}
