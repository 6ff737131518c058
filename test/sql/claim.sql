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
