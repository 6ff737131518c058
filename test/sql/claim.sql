-- Claim: what comes first, and how little is read to find it.
\getenv here PG_ABS_SRCDIR
\set tools :here '/sql/tools.psql'
\i :tools

CREATE FUNCTION claimed(handler text, max_items int DEFAULT 1) RETURNS TABLE (items bigint, label text) LANGUAGE sql AS $$
    SELECT count(*), (SELECT b.label FROM redrive.batches AS b WHERE b.batch_id = min(c.batch_id)) FROM redrive.claim(handler, max_items) AS c
$$;
-- What this transaction has read of the batches: entries of their indexes, and blocks.
CREATE FUNCTION batches_read() RETURNS text LANGUAGE sql AS $$
    SELECT CASE WHEN b.n < 200 THEN 'few' ELSE b.n::text END
    FROM (SELECT sum(pg_stat_get_xact_tuples_returned(i.indexrelid) + pg_stat_get_xact_blocks_fetched(i.indexrelid))
              + pg_stat_get_xact_blocks_fetched('redrive.batches'::regclass) AS n
          FROM pg_index AS i WHERE i.indrelid = 'redrive.batches'::regclass) AS b
$$;
-- Many batches of one item that waits for its retry, as if it had failed: no version of their rows is dead.
CREATE FUNCTION many_wait(handler text, batches int, priority int, next_at timestamptz, state redrive.batch_state DEFAULT 'retrying') RETURNS void LANGUAGE sql AS $$
    WITH b AS (
        INSERT INTO redrive.batches (handler_id, part, state, priority, total, claimed_to, waiting, submitted_by, run_at, serve_after, next_retry_at,
            oldest_failure_at, sealed_at, started_at, attempted_at, label, pause_reason)
        SELECT h.handler_id, 0, $5, $3, 1, 1, 1, current_user::regrole, now(), now(), $4, now(), now(), now(), now(), $1, CASE WHEN $5 = 'paused' THEN 'for a test' END
        FROM redrive.handlers AS h CROSS JOIN generate_series(1, $2) WHERE h.name = $1
        RETURNING part, batch_id, handler_id
    ), i AS (
        INSERT INTO redrive.item_blocks (part, batch_id, first_no, items, bytes, payloads) SELECT b.part, b.batch_id, 1, 1, 1, ARRAY['1']::jsonb[] FROM b
    )
    INSERT INTO redrive.failures (part, batch_id, item_no, handler_id, run_no, state, error_class, sqlstate, fingerprint,
        retry_count, free_count, attempts, first_failed_at, last_failed_at, next_attempt_at, message)
    SELECT b.part, b.batch_id, 1, b.handler_id, 1, 'waiting', 'other', 'P0001', 'x', 0, 0, 1, now(), now(), $4, 'x' FROM b;
$$;

-- A plan that was made in a quiet hour finds what comes first as quickly as any.
SELECT redrive.create_handler('past', kind => 'external'), redrive.create_handler('ready', kind => 'external');
SELECT count(redrive.cancel_batch(redrive.submit('past', ARRAY['1']::jsonb[]))) FROM generate_series(1, 500) AS i;
VACUUM ANALYZE redrive.batches;
SELECT * FROM claimed('ready');
SELECT count(redrive.submit('ready', ARRAY['1']::jsonb[], label => 'ready')) FROM generate_series(1, 500) AS i;
SELECT pg_stat_force_next_flush();
BEGIN;
SELECT * FROM claimed('ready');
SELECT batches_read();
ROLLBACK;

-- Batches that are paused are not read, though they have retries that are due; nor does the supervisor wake for them.
SELECT redrive.create_handler('paused', kind => 'external');
SELECT many_wait('paused', 500, 0, now() + interval '1 h', 'paused');
SELECT redrive._next_due(now()) IS NOT NULL AS wakes;
SELECT many_wait('paused', 500, 0, now() - interval '1 h', 'paused');
SELECT pg_stat_force_next_flush();
BEGIN;
SELECT * FROM claimed('paused');
SELECT batches_read();
ROLLBACK;
SELECT redrive.resume_batch(max(b.batch_id)) FROM redrive.batches AS b WHERE b.label = 'paused';
SELECT * FROM claimed('paused');

-- Of the retries that are due those of the highest priority come first, then those that have been due longest.
SELECT redrive.create_handler('retry', kind => 'external', retry_delay => '1 h');
CREATE FUNCTION fail(label text, priority int, items int) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    c record;
BEGIN
    PERFORM redrive.submit('retry', array_agg(to_jsonb(i)), label => fail.label, priority => fail.priority) FROM generate_series(1, fail.items) AS i;
    SELECT x.chunk_id, x.lease_token, array_agg(ROW(x.item_no, 'retry', 'no', NULL, NULL)::redrive.outcome) AS outcomes INTO c
    FROM redrive.claim('retry', fail.items) AS x GROUP BY x.chunk_id, x.lease_token;
    PERFORM redrive.complete(c.chunk_id, c.lease_token, c.outcomes);
END
$$;
CREATE FUNCTION make_due(label text, since interval) RETURNS void LANGUAGE sql AS $$
    UPDATE redrive.failures SET next_attempt_at = now() - $2 WHERE state = 'waiting' AND batch_id IN (SELECT b.batch_id FROM redrive.batches AS b WHERE b.label = $1);
    UPDATE redrive.batches SET next_retry_at = now() - $2 WHERE label = $1;
$$;
SELECT fail('low', 0, 6), fail('urgent', 7, 2), fail('also urgent', 7, 4), fail('not due', 9, 2);
SELECT make_due('low', '3 h'), make_due('urgent', '1 h'), make_due('also urgent', '2 h');
UPDATE redrive.failures SET next_attempt_at = now() - interval '30 min' WHERE item_no > 2 AND state = 'waiting' AND batch_id = batch('also urgent');
SELECT * FROM claimed('retry', 2);
SELECT * FROM claimed('retry', 2);
SELECT * FROM claimed('retry', 2);
SELECT * FROM claimed('retry', 2);
SELECT make_due('not due', '1 s');
SELECT * FROM claimed('retry', 2);
SELECT * FROM claimed('retry', 2);
SELECT * FROM claimed('retry', 2);
SELECT * FROM claimed('retry', 2);

-- Not many are read for it, however many wait at a higher priority, and at however many of them.
SELECT redrive.create_handler(v.handler, kind => 'external') FROM (VALUES ('lower'), ('higher')) AS v (handler);
SELECT many_wait('lower', 1000, 5, now() + interval '1 h'), many_wait('lower', 1000, 0, now() - interval '1 h'), many_wait('higher', 1000, 5, now() - interval '1 h');
SELECT count(many_wait(v.handler, 1, i, now() + interval '1 h')) FROM (VALUES ('lower'), ('higher')) AS v (handler), generate_series(6, 40) AS i;
SELECT pg_stat_force_next_flush();
BEGIN;
SELECT items FROM claimed('lower');
SELECT batches_read();
ROLLBACK;
SELECT pg_stat_force_next_flush();
BEGIN;
SELECT items FROM claimed('higher');
SELECT batches_read();
ROLLBACK;

-- The same for workers of the server, and between handlers.  The rows of what fails are rolled back.
CREATE TABLE tried (n int GENERATED ALWAYS AS IDENTITY, batch_id bigint);
CREATE FUNCTION try(item redrive.item) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO scratch.tried (batch_id) VALUES (item.batch_id);
    IF item.attempt = 1 THEN
        RAISE EXCEPTION 'no';
    END IF;
END
$$;
SELECT redrive.create_handler('try', 'try', retry_delay => '1 h'), redrive.create_handler('try too', 'try', retry_delay => '1 h');
SELECT count(redrive.submit(v.handler, '{1,2,3}'::jsonb[], label => v.label, priority => v.priority))
FROM (VALUES ('try', 'server low', 0), ('try', 'server urgent', 7), ('try', 'server also urgent', 7), ('try too', 'server too', 5)) AS v (handler, label, priority);
CALL redrive.work();
SELECT make_due('server low', '3 h'), make_due('server too', '2 h'), make_due('server urgent', '1 h'), make_due('server also urgent', '2 h');
CALL redrive.work();
SELECT b.label, count(*) AS items FROM tried AS t JOIN redrive.batches AS b ON b.batch_id = t.batch_id GROUP BY b.label ORDER BY min(t.n);
