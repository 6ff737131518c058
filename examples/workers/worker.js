#!/usr/bin/env node
// An external worker of pg_redrive in Node.js, with pg (Debian: node-pg; npm: pg).
//
// Usage: worker.js HANDLER; the database is that of PGHOST, PGPORT, PGUSER, PGDATABASE.  What it does with an
// item is doItem(); the rest is the same for every worker.  SIGTERM: it ends after the claim it is in.
'use strict';
const { Client } = require('pg');

const handler = process.argv[2];
const CLAIM = "SELECT * FROM redrive.claim($1, max_items => 50, lease => '2 min', worker => 'worker.js', wait => '5 s')";
const COMPLETE = `SELECT redrive.complete($1, $2, ARRAY(
    SELECT o FROM jsonb_populate_recordset(NULL::redrive.outcome, $3::jsonb) AS o))`;
class InputError extends Error {}

// The work: the square of n, stored in the database.  An error is the end of this item only.
async function doItem(db, item) {
  const n = item.payload?.n;
  if (!Number.isInteger(n)) throw new InputError('n is not a number');
  await db.query('INSERT INTO conformance.done (batch_id, item_no, attempt, result) VALUES ($1, $2, $3, $4)',
    [item.batch_id, item.item_no, item.attempt, n * n]);
}

// What an error means: the decision is the worker's.  Errors of the database have a severity.
function outcome(item, error) {
  if (error instanceof InputError)
    return { item_no: item.item_no, outcome: 'failed', code: 'E-INPUT', message: error.message };
  if (error.severity !== 'ERROR') throw error;
  const kind = error.code === 'RD001' ? 'ignored' : /^2[23]/.test(error.code) ? 'failed' : 'retry';
  return { item_no: item.item_no, outcome: kind, code: error.code, message: error.message };
}

// Claim items, do them, and say what became of them, in one transaction with what they wrote.
async function work(db) {
  const items = (await db.query(CLAIM, [handler])).rows; // committed at once
  if (items.length === 0) return;
  const exceptions = [];
  await db.query('BEGIN');
  try {
    for (const item of items) {
      await db.query('SAVEPOINT item');
      try {
        await doItem(db, item);
        await db.query('RELEASE item');
      } catch (error) {
        exceptions.push(outcome(item, error));
        await db.query('ROLLBACK TO item');
      }
    }
    await db.query(COMPLETE, [items[0].chunk_id, items[0].lease_token, JSON.stringify(exceptions)]);
    await db.query('COMMIT');
  } catch (error) {
    await db.query('ROLLBACK'); // fails when the connection is lost
    if (error.code !== 'RD004') // that is: too late, others do it
      await db.query('SELECT redrive.release($1, $2)', [items[0].chunk_id, items[0].lease_token]);
    throw error; // main() tells, and waits a moment: it may come again at once
  }
}

async function main() {
  let stop = false;
  process.on('SIGTERM', () => { stop = true; });
  while (!stop) {
    const db = new Client();
    let lost = null;
    db.on('error', (error) => { lost = error; });
    try {
      await db.connect();
      while (!stop && !lost) await work(db);
    } catch (error) {
      console.error(error.message);
      await new Promise((resolve) => setTimeout(resolve, 1000));
    }
    await db.end().catch(() => {});
  }
}

main();
