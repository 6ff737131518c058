-- Claim: what comes first, and how little is read to find it.
\getenv here PG_ABS_SRCDIR
\set tools :here '/sql/tools.psql'
\i :tools

-- What this transaction has read of the batches: entries of their indexes, and blocks.
CREATE FUNCTION batches_read() RETURNS text LANGUAGE sql AS $$
    SELECT CASE WHEN b.n < 200 THEN 'few' ELSE b.n::text END
    FROM (SELECT sum(pg_stat_get_xact_tuples_returned(i.indexrelid) + pg_stat_get_xact_blocks_fetched(i.indexrelid))
              + pg_stat_get_xact_blocks_fetched('redrive.batches'::regclass) AS n
          FROM pg_index AS i WHERE i.indrelid = 'redrive.batches'::regclass) AS b
$$;
CREATE FUNCTION claimed(max_items int DEFAULT 1) RETURNS TABLE (items bigint, label text) LANGUAGE sql AS $$
    SELECT count(*), (SELECT b.label FROM redrive.batches AS b WHERE b.batch_id = min(c.batch_id)) FROM redrive.claim('external', max_items) AS c
$$;
SELECT redrive.create_handler('external', kind => 'external', retry_delay => '1 h');

-- A plan that was made in a quiet hour finds what comes first as quickly as any.
SELECT count(redrive.cancel_batch(redrive.submit('external', ARRAY['1']::jsonb[]))) FROM generate_series(1, 2000) AS i;
VACUUM ANALYZE redrive.batches;
SELECT * FROM claimed();
SELECT count(redrive.submit('external', ARRAY['1']::jsonb[], label => 'ready')) FROM generate_series(1, 2000) AS i;
SELECT pg_stat_force_next_flush();
BEGIN;
SELECT * FROM claimed();
SELECT batches_read();
ROLLBACK;
SELECT count(redrive.cancel_batch(b.batch_id)) FROM redrive.batches AS b WHERE b.label = 'ready';

-- Items that fail wait for their retries; make them due after so long.
CREATE FUNCTION fail(label text, priority int DEFAULT 0, items int DEFAULT 1) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    c record;
BEGIN
    PERFORM redrive.submit('external', array_agg(to_jsonb(i)), label => fail.label, priority => fail.priority) FROM generate_series(1, fail.items) AS i;
    SELECT x.chunk_id, x.lease_token, array_agg(ROW(x.item_no, 'retry', 'no', NULL, NULL)::redrive.outcome) AS outcomes INTO c
    FROM redrive.claim('external', fail.items) AS x GROUP BY x.chunk_id, x.lease_token;
    PERFORM redrive.complete(c.chunk_id, c.lease_token, c.outcomes);
END
$$;
CREATE FUNCTION make_due(label text, since interval) RETURNS void LANGUAGE sql AS $$
    UPDATE redrive.failures SET next_attempt_at = now() - $2 WHERE state = 'waiting' AND batch_id IN (SELECT b.batch_id FROM redrive.batches AS b WHERE b.label = $1);
    UPDATE redrive.batches SET next_retry_at = now() - $2 WHERE label = $1;
$$;

-- Batches that are paused are not read, though they have retries that are due; nor does the supervisor wake for them.
SELECT count(fail('paused')) FROM generate_series(1, 500) AS i;
SELECT count(redrive.pause_batch(b.batch_id)) FROM redrive.batches AS b WHERE b.label = 'paused';
SELECT redrive._next_due(now()) IS NOT NULL AS wakes;
SELECT make_due('paused', '1 h');
SELECT pg_stat_force_next_flush();
BEGIN;
SELECT * FROM claimed();
SELECT batches_read();
ROLLBACK;
SELECT count(redrive.resume_batch(b.batch_id)) FROM redrive.batches AS b WHERE b.label = 'paused';
SELECT * FROM claimed();
