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

// Durable, as what the peers do; or without waiting for the disk: a claim that a crash swallows is refused later (docs/workers.md).
async function take(client, size, claims) {
  if (claims !== 'lazy') return client.query({ ...CLAIM, values: [size] });
  const [, , claim] = await Promise.all([client.query('BEGIN'), client.query('SET LOCAL synchronous_commit = off'),
    client.query({ ...CLAIM, values: [size] }), client.query('COMMIT')]);
  return claim;
}

async function loop(client, pool, { size, style, claims }) {
  for (;;) {
    const claim = await take(client, size, claims);
    if (claim.rows.length === 0) return;
    const { chunk_id, lease_token } = claim.rows[0];
    const ids = claim.rows.map((row) => row.payload.id);
    if (style === 'settle') {
      // a transaction for each item, with its outcome: each is done exactly once, and alone
      await Promise.all(claim.rows.flatMap((row) => [client.query('BEGIN'), approve(client, row.payload.id),
        client.query({ ...SETTLE, values: [chunk_id, lease_token, row.item_no] }), client.query('COMMIT')]));
    }
    const complete = (c) => c.query({ ...COMPLETE, values: [chunk_id, lease_token] });
    if (style === 'settle') await complete(client);
    else if (style === 'batch') await approveAll(client, ids, complete);
    else if (style === 'turn') await approveInTurn(client, ids, complete);
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
