// PgQ with a consumer that is a client; one ticker batch is one claim.  The queue is made by bench/pgq.sql.
import pg from 'pg';
import { approveAll, approveEach, approveInTurn, LANES, pipelined } from './work.mjs';

export const fill = (db, { items, size }) => db.query(`CALL pgq_enqueue(${items}, ${size})`);

export async function connect() {
  return { client: await pipelined(), pool: new pg.Pool({ max: LANES }) };
}

export async function work({ client, pool }, { style }) {
  for (;;) {
    const batch = (await client.query("SELECT pgq.next_batch('approve', 'worker') AS id")).rows[0].id;
    if (batch === null) return;
    const events = (await client.query('SELECT ev_data FROM pgq.get_batch_events($1)', [batch])).rows;
    const ids = events.map((event) => JSON.parse(event.ev_data).id);
    const finish = (c) => c.query('SELECT pgq.finish_batch($1)', [batch]);
    if (style === 'batch') await approveAll(client, ids, finish);
    else if (style === 'turn') await approveInTurn(client, ids, finish);
    else { await approveEach(pool, ids); await finish(client); }
  }
}

export const check = () => null;
export const close = ({ client, pool }) => Promise.all([client.end(), pool.end()]);
