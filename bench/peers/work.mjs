// The work, as every adapter does it.
import pg from 'pg';

export const LANES = 10;

// A connection whose statements are sent without waiting for the answers before.
export async function pipelined() {
  const client = new pg.Client({ pipeline: true });
  await client.connect();
  return client;
}

export const approve = (client, id) => client.query({ name: 'approve', text: 'SELECT approve_todo($1)', values: [id] });

// A transaction per item, on LANES connections of the pool.
export async function approveEach(pool, ids) {
  let next = 0;
  await Promise.all(Array.from({ length: Math.min(LANES, ids.length) }, async () => {
    while (next < ids.length) {
      const id = ids[next++];
      // pool.query() would throw the connection away after an error
      const client = await pool.connect();
      try { await approve(client, id); } finally { client.release(); }
    }
  }));
}

// One transaction for all items and what "after" does on the same connection, each statement sent when the one before is answered.
export async function approveInTurn(client, ids, after) {
  await client.query('BEGIN');
  for (const id of ids) await approve(client, id);
  await after(client);
  await client.query('COMMIT');
}

// The same, sent without waiting for answers.  If one fails all are rolled back; a worker would then do them one by one,
// with savepoints.
export async function approveAll(client, ids, after) {
  await Promise.all([client.query('BEGIN'), ...ids.map((id) => approve(client, id)), after(client), client.query('COMMIT')]);
}
