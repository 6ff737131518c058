// pg_redrive: claim() and complete(); examples/workers has the readable form.
import pg from 'pg';
import { approve, approveAll, approveEach, approveInTurn, LANES, pipelined } from './work.mjs';

// connections that claim, of each process; more when they wait for a commit of each item
const connections = ({ size, style }) => (size === 1 || style === 'settle' ? 8 : 2);
const CLAIM = { name: 'claim', text: "SELECT chunk_id, lease_token, item_no, payload FROM redrive.claim('external', $1)" };
const SETTLE = { name: 'settle', text: "SELECT redrive.settle($1, $2, ARRAY[ROW($3::bigint, 'ok', NULL, NULL, NULL)::redrive.outcome])" };
const COMPLETE = { name: 'complete', text: 'SELECT redrive.complete($1, $2)' };

export async function fill(db, { items }) {
  const { rows } = await db.query("SELECT count(*)::int AS n FROM redrive.handlers WHERE name = 'external'");
  if (rows[0].n === 0) await db.query("SELECT redrive.create_handler('external', kind => 'external')");
  await db.query("SELECT redrive.submit_query('external', format('SELECT NULL::text, jsonb_build_object(''id'', g) FROM generate_series(1, %s) AS g', $1::int))", [items]);
}

export async function connect(options) {
  const loops = Array.from({ length: connections(options) }, () => pipelined());
  return { loops: await Promise.all(loops), pool: new pg.Pool({ max: LANES }) };
}

const claim = (client, size) => client.query({ ...CLAIM, values: [size] });

async function loop(client, pool, { size, style }) {
  let next;
  for (;;) {
    const { rows } = next?.rows.length > 0 ? next : await claim(client, size);
    if (rows.length === 0) return;
    const { chunk_id, lease_token } = rows[0];
    const ids = rows.map((row) => row.payload.id);
    const complete = (c) => c.query({ ...COMPLETE, values: [chunk_id, lease_token] });
    // the next claim with the end of this one, in one commit
    const completeAndClaim = (c) => Promise.all([complete(c), claim(c, size).then((result) => { next = result; })]);
    next = undefined;
    if (style === 'settle') {
      // a transaction for each item, with its outcome: each is done exactly once, and alone
      await Promise.all(rows.flatMap((row) => [client.query('BEGIN'), approve(client, row.payload.id),
        client.query({ ...SETTLE, values: [chunk_id, lease_token, row.item_no] }), client.query('COMMIT')]));
      await complete(client);
    } else if (style === 'chain') await approveAll(client, ids, completeAndClaim);
    else if (style === 'batch') await approveAll(client, ids, complete);
    else if (style === 'turn') await approveInTurn(client, ids, completeAndClaim);
    else { await approveEach(pool, ids); await complete(client); }
  }
}

export const work = ({ loops, pool }, options) => Promise.all(loops.map((client) => loop(client, pool, options)));

export async function finished(db) {
  const { rows } = await db.query("SELECT bool_and(state = 'finished') AS all FROM redrive.batch_progress WHERE handler = 'external' AND state <> 'cancelled'");
  return rows[0].all;
}

export async function check(db) {
  const { rows } = await db.query('SELECT string_agg(check_name, \', \') AS wrong FROM redrive.verify() WHERE NOT ok');
  return rows[0].wrong;
}

export const close = ({ loops, pool }) => Promise.all([...loops.map((client) => client.end()), pool.end()]);
