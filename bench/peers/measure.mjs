// Measure a queue whose workers are clients: measure.mjs SYSTEM [NAME=VALUE...], prints items per second.
//   SYSTEM  redrive, graphile, pgboss or pgq: the adapter of that name
//   items   how many to-do items are approved, one UPDATE each (table and function: bench/schema.sql)
//   procs   client processes; they are started and connected before the time is taken
//   size    items that are claimed at a time
//   style   each = a transaction per item, on several connections at a time, and the queue's own books after it;
//           turn = one transaction for what was claimed and for the queue's own books, statement by statement;
//           batch = the same, statements sent without waiting for the answers before;
//           chain, turn of redrive = with the next claim in the transaction that ends the one before;
//           settle = of redrive: a transaction per item, with the outcome in it
// Filling the queue is not measured.  The database is that of PGHOST, PGPORT, PGUSER, PGDATABASE.
import { fork } from 'node:child_process';
import pg from 'pg';

const options = { items: 100000, procs: 1, size: 100, style: 'batch' };
for (const arg of process.argv.slice(3)) {
  const [name, value] = arg.split('=');
  options[name] = Number.isNaN(Number(value)) ? value : Number(value);
}
const adapter = await import(`./${process.argv[2]}.mjs`);
const once = (child, what) => new Promise((resolve, reject) => {
  child.on('message', (message) => { if (message === what) resolve(); });
  child.on('exit', (code) => { if (code) reject(new Error('a client failed')); });
});

if (process.send) {
  // a client: connect, wait for the signal, work until told that all is done or nothing is left
  const state = await adapter.connect(options);
  process.on('message', async (message) => {
    if (message === 'go') {
      await adapter.work(state, options);
      process.send('done');
    } else {
      await adapter.close(state);
      process.exit(0);
    }
  });
  process.send('ready');
} else {
  const db = new pg.Client();
  await db.connect();
  await adapter.fill(db, options);
  const children = Array.from({ length: options.procs }, () => fork(process.argv[1], process.argv.slice(2)));
  await Promise.all(children.map((child) => once(child, 'ready')));
  await db.query('CHECKPOINT');

  const began = process.hrtime.bigint();
  const done = children.map((child) => once(child, 'done'));
  for (const child of children) child.send('go');
  await Promise.all(done);
  while (adapter.finished && !(await adapter.finished(db))) await new Promise((resolve) => setTimeout(resolve, 10));
  const seconds = Number(process.hrtime.bigint() - began) / 1e9;

  for (const child of children) child.send('stop');
  const wrong = await adapter.check(db, options);
  const { rows } = await db.query("SELECT count(*)::int AS n FROM todo WHERE state = 'approved'");
  if (wrong || rows[0].n !== options.items) {
    console.error(`WRONG: ${rows[0].n} of ${options.items} approved; ${wrong}`);
    process.exitCode = 1;
  }
  console.log((options.items / seconds).toFixed(0));
  await db.end();
}
