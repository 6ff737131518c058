-- External: claims by applications, what they settle, and what becomes of claims
-- that are lost.  Races are in specs/external_race.spec, processes in
-- t/030_external.pl.
\getenv here PG_ABS_SRCDIR
\set tools :here '/sql/tools.psql'
\i :tools

-- A claim is called by a name.
CREATE TABLE mine (name text, chunk_id bigint, lease_token bigint);
CREATE FUNCTION claim(name text, handler text, max_items int, lease interval DEFAULT '5 min') RETURNS TABLE (label text, item_no bigint, key text, payload jsonb, attempt int)
LANGUAGE plpgsql AS $$
DECLARE
    r record;
BEGIN
    FOR r IN SELECT * FROM redrive.claim(handler, max_items, lease, worker => name) LOOP
        IF NOT EXISTS (SELECT FROM scratch.mine AS m WHERE m.lease_token = r.lease_token) THEN
            DELETE FROM scratch.mine AS m WHERE m.name = claim.name;
            INSERT INTO scratch.mine VALUES (claim.name, r.chunk_id, r.lease_token);
        END IF;
        RETURN QUERY SELECT b.label, r.item_no, r.key, r.payload, r.attempt FROM redrive.batch_progress AS b WHERE b.batch_id = r.batch_id;
    END LOOP;
END
$$;
CREATE FUNCTION chunk(name text) RETURNS bigint LANGUAGE sql STABLE AS 'SELECT m.chunk_id FROM scratch.mine AS m WHERE m.name = $1';
CREATE FUNCTION token(name text) RETURNS bigint LANGUAGE sql STABLE AS 'SELECT m.lease_token FROM scratch.mine AS m WHERE m.name = $1';
CREATE FUNCTION outcome(item_no bigint, outcome text DEFAULT 'ok', message text DEFAULT NULL, code text DEFAULT NULL, delay interval DEFAULT NULL)
RETURNS redrive.outcome LANGUAGE sql AS 'SELECT ROW($1, $2::redrive.outcome_kind, $3, $4, $5)::redrive.outcome';
CREATE FUNCTION settle(name text, VARIADIC outcomes redrive.outcome[]) RETURNS void LANGUAGE sql AS 'SELECT redrive.settle(scratch.chunk($1), scratch.token($1), $2)';
CREATE FUNCTION complete(name text, VARIADIC exceptions redrive.outcome[] DEFAULT '{}') RETURNS void LANGUAGE sql AS 'SELECT redrive.complete(scratch.chunk($1), scratch.token($1), $2)';
CREATE FUNCTION release(name text) RETURNS void LANGUAGE sql AS 'SELECT redrive.release(scratch.chunk($1), scratch.token($1))';
-- How it fails, chunks by their names, times without time.
CREATE FUNCTION how(statement text) RETURNS SETOF text LANGUAGE sql AS $$
    SELECT regexp_replace(regexp_replace(regexp_replace(f, 'chunk \d+', 'chunk N', 'g'), 'token \d+', 'token N', 'g'), '\d{4}-\d\d-\d\d \d\d:\d\d:\d\d[-+]\d\d(:\d\d)?', 'T', 'g')
    FROM scratch.fails(statement) AS f
$$;
CREATE FUNCTION submit(handler text, label text, items int, keyed boolean DEFAULT false, priority int DEFAULT 0) RETURNS boolean LANGUAGE sql AS $$
    SELECT redrive.submit($1, array_agg(to_jsonb(n) ORDER BY n), CASE WHEN $4 THEN array_agg($2 || ' ' || n ORDER BY n) END, label => $2, priority => $5) > 0
    FROM generate_series(1, $3) AS n
$$;
-- Claim and complete what there is.
CREATE PROCEDURE work_off(handler text) LANGUAGE plpgsql AS $$
BEGIN
    WHILE EXISTS (SELECT FROM scratch.claim('worker', handler, 100)) LOOP
        PERFORM redrive.complete(scratch.chunk('worker'), scratch.token('worker'));
        COMMIT;
    END LOOP;
END
$$;
-- The end of a cancelled batch is written down after its last claim, by the supervisor or by us.
CREATE PROCEDURE until_ended(label text) LANGUAGE plpgsql AS $$
DECLARE
    v_started timestamptz := clock_timestamp();
BEGIN
    WHILE EXISTS (SELECT FROM redrive.batch_progress AS b WHERE b.label = until_ended.label AND b.finished_at IS NULL)
          AND clock_timestamp() < v_started + interval '30 s' LOOP
        PERFORM redrive._fold_ended();
        COMMIT;
    END LOOP;
END
$$;
CREATE VIEW claims AS
SELECT coalesce(m.name, c.worker) AS name, c.kind, c.state, c.from_no, c.to_no, c.done_to, c.settled, c.items, c.done, c.rescue_count AS lost
FROM redrive.chunks AS c LEFT JOIN mine AS m ON m.chunk_id = c.chunk_id ORDER BY c.chunk_id;

-- Handlers of this kind have no function.
SELECT redrive.create_handler('mail', kind => 'external', max_retries => 1, retry_delay => '1 h');
SELECT how($$SELECT redrive.create_handler('f', 'f', kind => 'external')$$);
SELECT how($$SELECT redrive.alter_handler('mail', function => 'scratch.mine_too')$$);
CREATE FUNCTION row_function(payload jsonb) RETURNS void LANGUAGE sql AS '';
SELECT how($$SELECT redrive.alter_handler('mail', function => 'row_function')$$);
SELECT redrive.create_handler('inside', 'row_function');

-- Two claims of one batch; then there is nothing.
SELECT submit('mail', 'first', 5);
SELECT * FROM claim('a', 'mail', 3);
SELECT * FROM claim('b', 'mail', 3);
SELECT * FROM claim('c', 'mail', 3);
SELECT * FROM progress;
SELECT state, item_no FROM redrive.item_status ORDER BY item_no;
-- Workers of the server leave it alone.
CALL redrive.work();
SELECT * FROM progress;

-- What they may not ask for.
SELECT how($$SELECT * FROM redrive.claim('inside')$$);
SELECT how($$SELECT * FROM redrive.claim('nothing')$$);
SELECT how($$SELECT * FROM redrive.claim(NULL)$$);
SELECT how($$SELECT * FROM redrive.claim('mail', 0)$$);
SELECT how($$SELECT * FROM redrive.claim('mail', 10001)$$);
SELECT how($$SELECT * FROM redrive.claim('mail', NULL)$$);
SELECT how($$SELECT * FROM redrive.claim('mail', lease => NULL)$$);
SELECT how($$SELECT * FROM redrive.claim('mail', lease => '0')$$);
SELECT how($$SELECT * FROM redrive.claim('mail', lease => '31 days')$$);
SELECT how($$SELECT * FROM redrive.claim('mail', wait => '-1 s')$$);
BEGIN ISOLATION LEVEL REPEATABLE READ;
SELECT how($$SELECT * FROM redrive.claim('mail', wait => '1 s')$$);
SELECT * FROM redrive.claim('mail');
COMMIT;
SELECT * FROM redrive.claim('mail', wait => '20 ms');
BEGIN READ ONLY;
SELECT how($$SELECT * FROM redrive.claim('mail')$$);
SELECT how($$SELECT redrive.settle(1, 1, '{}')$$);
SELECT how($$SELECT redrive.complete(1, 1)$$);
COMMIT;

-- Settled out of order: what is done up to where moves on when it can.
SELECT settle('a', outcome(3), outcome(2));
SELECT * FROM claims;
SELECT state, item_no FROM redrive.item_status ORDER BY item_no;
SELECT * FROM broken;
SELECT settle('a', outcome(1));
SELECT * FROM claims;
SELECT complete('a');
SELECT redrive.settle(chunk('b'), token('b'), '{}');
SELECT complete('b', outcome(4, 'failed', 'no such address', '550'));
CALL redrive.wait(batch('first'), '30 s');
SELECT * FROM progress;
SELECT item_no, state, reason, error_class, sqlstate, message, detail, attempts FROM redrive.failed_items;
SELECT * FROM broken;

-- An outcome that does not fit is named, and nothing is changed.
SELECT submit('mail', 'wrong', 6);
SELECT count(*) FROM claim('a', 'mail', 5);
-- an empty code is none
SELECT settle('a', outcome(2, 'failed', code => ''), outcome(4));
SELECT how($$SELECT settle('a', outcome(1), outcome(4))$$);
SELECT how($$SELECT settle('a', outcome(1), outcome(2, 'retry'))$$);
SELECT how($$SELECT settle('a', outcome(1), outcome(6))$$);
SELECT how($$SELECT settle('a', outcome(0))$$);
SELECT how($$SELECT settle('a', outcome(1), outcome(3), outcome(1, 'failed'))$$);
SELECT how($$SELECT settle('a', outcome(1), outcome(NULL))$$);
SELECT how($$SELECT settle('a', outcome(1), NULL)$$);
SELECT how($$SELECT settle('a', outcome(1, NULL))$$);
SELECT how($$SELECT settle('a', outcome(1, 'snoozed', delay => '-1 s'))$$);
SELECT how($$SELECT settle('a', outcome(1, 'retry', delay => '101 years'))$$);
SELECT how($$SELECT complete('a', outcome(4))$$);
SELECT how($$SELECT complete('a', outcome(7, 'failed'))$$);
SELECT how($$SELECT complete('a', outcome(5, 'failed'), outcome(5, 'failed'))$$);
SELECT how($$SELECT redrive.settle(chunk('a'), token('a'), NULL)$$);
SELECT how($$SELECT redrive.settle(NULL, token('a'), '{}')$$);
SELECT how($$SELECT redrive.complete(chunk('a'), NULL)$$);
SELECT how($$SELECT redrive.complete(chunk('a'), token('a'), NULL)$$);
SELECT * FROM claims WHERE state = 'running';
SELECT * FROM broken;

-- All outcomes.  A delay of its own, that of the handler, and none.
SELECT settle('a', outcome(1, 'retry', 'busy', 'E-17', '10 min'));
SELECT complete('a', outcome(3, 'snoozed', delay => '2 h'), outcome(5, 'retry', 'deadlock', '40P01'));
SELECT count(*) FROM claim('b', 'mail', 5);
SELECT complete('b', outcome(6, 'ignored', 'out of date'));
SELECT item_no, state, reason, error_class, sqlstate, message, retry_count, round(extract(epoch FROM next_attempt_at - last_failed_at) / 600) AS ten_minutes
FROM redrive.failed_items WHERE batch_id = batch('wrong') ORDER BY item_no;
-- Due again: together in one claim, each with its attempt.  A retry costs one, a snooze does not.
CALL make_due();
SELECT * FROM claim('a', 'mail', 100);
SELECT * FROM claims WHERE state = 'running';
SELECT settle('a', outcome(5, 'retry'), outcome(3, 'snoozed', delay => '1 min'));
SELECT state, item_no FROM redrive.item_status WHERE batch_id = batch('wrong') ORDER BY item_no;
SELECT * FROM broken;
SELECT * FROM claims WHERE state = 'running';
SELECT complete('a');
CALL make_due();
SELECT * FROM claim('a', 'mail', 100);
SELECT complete('a');
CALL redrive.wait(batch('wrong'), '30 s');
SELECT item_no, state, reason, error_class, sqlstate, message, retry_count, attempts FROM redrive.failed_items WHERE batch_id = batch('wrong') ORDER BY item_no;
SELECT * FROM progress WHERE label = 'wrong';
SELECT * FROM broken;

-- Who has no claim, or not any more, is refused; with it goes what he wrote.
CREATE TABLE effects (item_no bigint);
SELECT submit('mail', 'late', 4);
SELECT count(*) FROM claim('a', 'mail', 4);
SELECT how($$SELECT redrive.complete(chunk('a'), token('a') + 1)$$);
SELECT how($$SELECT redrive.settle(chunk('a') + 1000, token('a'), ARRAY[outcome(1)])$$);
SELECT how($$SELECT redrive.heartbeat(NULL, token('a'))$$);
BEGIN;
INSERT INTO effects VALUES (1);
SELECT settle('a', outcome(1));
COMMIT;
SELECT release('a');
SELECT * FROM claims WHERE state = 'orphaned';
SELECT how($$SELECT complete('a')$$);
SELECT how($$SELECT settle('a', outcome(2))$$);
SELECT how($$SELECT release('a')$$);
SELECT how($$SELECT redrive.heartbeat(chunk('a'), token('a'))$$);
SELECT item_no, attempt FROM claim('b', 'mail', 4);
SELECT how($$SELECT redrive.complete(chunk('b'), token('b') - 1)$$);
DO $$
BEGIN
    INSERT INTO scratch.effects VALUES (2);
    PERFORM redrive.complete(scratch.chunk('b'), scratch.token('b') - 1);
EXCEPTION WHEN SQLSTATE 'RD004' THEN
    NULL;
END
$$;
INSERT INTO effects VALUES (2), (3), (4);
SELECT complete('b');
SELECT how($$SELECT complete('b')$$);
SELECT item_no, count(*) FROM effects GROUP BY item_no ORDER BY item_no;
CALL redrive.wait(batch('late'), '30 s');
SELECT * FROM progress WHERE label = 'late';

-- A claim that is rolled back gives all back.
SELECT submit('mail', 'rolled back', 2);
BEGIN;
SELECT count(*) FROM claim('a', 'mail', 4);
SELECT complete('a');
ROLLBACK;
SELECT count(*) FROM claim('a', 'mail', 4);
BEGIN;
SELECT settle('a', outcome(1, 'failed'));
ROLLBACK;
SELECT complete('a');
CALL redrive.wait(batch('rolled back'), '30 s');
SELECT * FROM progress WHERE label = 'rolled back';

-- Keys, and callbacks, which a worker of the server calls as the owner.
CREATE TABLE called (what text);
CREATE FUNCTION unlocked(key text) RETURNS void LANGUAGE sql AS $$ INSERT INTO scratch.called VALUES (key) $$;
CREATE FUNCTION ended(batch_id bigint, run_no int) RETURNS void LANGUAGE sql AS $$ INSERT INTO scratch.called VALUES ('run ' || run_no) $$;
SELECT redrive.create_handler('keyed', kind => 'external', on_unlock => 'unlocked', on_finish => 'ended');
SELECT submit('keyed', 'k', 4, true);
SELECT * FROM claim('a', 'keyed', 3);
SELECT settle('a', outcome(3), outcome(2, 'retry', delay => '0'));
SELECT n, redrive.is_locked('keyed', 'k ' || n) FROM generate_series(1, 4) AS n;
SELECT * FROM broken;
SELECT complete('a');
SELECT n, redrive.is_locked('keyed', 'k ' || n) FROM generate_series(1, 4) AS n;
SELECT item_no, key, attempt FROM claim('a', 'keyed', 1);
SELECT item_no, key, attempt FROM claim('b', 'keyed', 1);
SELECT complete('a');
SELECT complete('b', outcome((SELECT max(i.item_no) FROM redrive.item_status AS i WHERE i.batch_id = batch('k') AND i.state = 'running'), 'failed'));
CALL redrive.wait(batch('k'), '30 s');
CALL redrive.work();
SELECT what FROM called ORDER BY what;
SELECT * FROM progress WHERE label = 'k';
SELECT * FROM broken;

-- A redrive, in claims smaller than its list; items of them settled, some not.
SELECT redrive.create_handler('bulk', kind => 'external', retry_delay => NULL);
SELECT submit('bulk', 'again', 50);
SELECT count(*) FROM claim('a', 'bulk', 50);
SELECT redrive.complete(chunk('a'), token('a'), ARRAY(SELECT outcome(n, 'failed') FROM generate_series(1, 50) AS n WHERE n % 2 = 0));
CALL redrive.wait(batch('again'), '30 s');
-- on a slow machine they would be more than one list
UPDATE redrive.batches SET items_per_second = 1000 WHERE label = 'again';
SELECT redrive.redrive(batch('again'));
SELECT array_agg(item_no ORDER BY item_no) AS items, min(attempt) AS attempt FROM claim('a', 'bulk', 5);
SELECT array_agg(item_no ORDER BY item_no) AS items, min(attempt) AS attempt FROM claim('b', 'bulk', 4);
SELECT settle('a', outcome(8), outcome(2));
SELECT settle('b', outcome(18, 'failed'));
SELECT release('a'), release('b');
SELECT * FROM broken;
SELECT array_agg(item_no ORDER BY item_no) AS items, min(attempt) AS attempt FROM claim('a', 'bulk', 2);
SELECT array_agg(item_no ORDER BY item_no) AS items, min(attempt) AS attempt FROM claim('b', 'bulk', 7);
SELECT array_agg(item_no ORDER BY item_no) AS items, min(attempt) AS attempt FROM claim('c', 'bulk', 100);
SELECT * FROM claims WHERE state = 'running';
SELECT * FROM broken;
SELECT complete('a'), complete('b'), complete('c');
SELECT array_agg(item_no ORDER BY item_no) AS items, min(attempt) AS attempt FROM claim('a', 'bulk', 100);
SELECT array_agg(item_no ORDER BY item_no) AS items, min(attempt) AS attempt FROM claim('b', 'bulk', 100);
SELECT complete('a'), complete('b');
CALL redrive.wait(batch('again'), '30 s');
SELECT * FROM progress WHERE label = 'again';
SELECT * FROM broken;

-- A range that is given back with holes, claimed in parts.
SELECT submit('bulk', 'holes', 20, true);
SELECT count(*) FROM claim('a', 'bulk', 20);
SELECT redrive.settle(chunk('a'), token('a'), ARRAY(SELECT outcome(n) FROM generate_series(2, 20, 3) AS n));
SELECT release('a');
SELECT array_agg(item_no ORDER BY item_no) AS items FROM claim('a', 'bulk', 5);
SELECT array_agg(item_no ORDER BY item_no) AS items FROM claim('b', 'bulk', 100);
SELECT * FROM claims WHERE state = 'running';
SELECT * FROM broken;
-- Cancelled: whoever has a claim is told, may settle what he did, and the rest is cancelled.
SELECT redrive.heartbeat(chunk('a'), token('a'), '1 min') < now() + interval '2 min' AS renewed;
SELECT redrive.cancel_batch(batch('holes'));
SELECT * FROM progress WHERE label = 'holes';
SELECT redrive.heartbeat(chunk('a'), token('a'));
SELECT settle('a', outcome(4), outcome(6, 'retry'));
SELECT release('a');
SELECT * FROM broken;
SELECT complete('b');
CALL until_ended('holes');
SELECT * FROM progress WHERE label = 'holes';
SELECT state, array_agg(item_no ORDER BY item_no) AS items FROM redrive.item_status WHERE batch_id = batch('holes') GROUP BY state ORDER BY state;
SELECT count(*) FROM redrive.locks;
SELECT * FROM broken;
-- The same with retries that are claimed.
SELECT submit('bulk', 'retries', 4, true);
SELECT count(*) FROM claim('a', 'bulk', 4);
SELECT complete('a', outcome(1, 'retry', delay => '0'), outcome(2, 'retry', delay => '0'), outcome(4, 'retry', delay => '0'));
SELECT count(*) FROM claim('a', 'bulk', 4);
SELECT settle('a', outcome(2));
SELECT redrive.cancel_batch(batch('retries'));
SELECT release('a');
CALL until_ended('retries');
SELECT * FROM progress WHERE label = 'retries';
SELECT state, array_agg(item_no ORDER BY item_no) AS items FROM redrive.item_status WHERE batch_id = batch('retries') GROUP BY state ORDER BY state;
SELECT count(*) FROM redrive.locks;
SELECT * FROM broken;

-- A worker that dies: its lease ends, and a pass takes the rest back.
SELECT submit('bulk', 'lost', 8);
SELECT count(*) FROM claim('a', 'bulk', 8, '1 h');
SELECT settle('a', outcome(1), outcome(5));
SELECT s.reason, s.action FROM redrive.stale_batches_at(now() + interval '59 min') AS s WHERE s.batch_id = batch('lost');
SELECT s.reason, s.action FROM redrive.stale_batches_at(now() + interval '61 min') AS s WHERE s.batch_id = batch('lost');
SELECT acted, detail FROM redrive.rescue_stale(now() + interval '59 min');
SELECT redrive.heartbeat(chunk('a'), token('a'), '2 h') > now() + interval '119 min' AS renewed;
SELECT acted, detail FROM redrive.rescue_stale(now() + interval '61 min');
SELECT redrive.heartbeat(chunk('a'), token('a'), '1 h') < now() + interval '61 min' AS renewed;
SELECT acted, detail FROM redrive.rescue_stale(now() + interval '61 min');
SELECT * FROM claims WHERE state = 'orphaned';
SELECT how($$SELECT complete('a')$$);
-- Half as many the next time, lest one item be the end of the whole claim again and again; no attempt is counted.
SELECT array_agg(item_no ORDER BY item_no) AS items, min(attempt) AS attempt FROM claim('a', 'bulk', 8);
SELECT array_agg(item_no ORDER BY item_no) AS items, min(attempt) AS attempt FROM claim('b', 'bulk', 8);
SELECT * FROM broken;
SELECT complete('a'), complete('b');
CALL work_off('bulk');
CALL redrive.wait(batch('lost'), '30 s');
SELECT * FROM progress WHERE label = 'lost';

-- A lease that ended while the server was down, when nobody could renew it, counts from its start.
SELECT submit('bulk', 'down', 1);
SELECT count(*) FROM claim('a', 'bulk', 1, '30 days');
BEGIN;
UPDATE redrive.chunks SET lease_until = now() - interval '1 s' WHERE state = 'running';
SELECT alive FROM redrive._running_chunks;
UPDATE redrive.chunks SET lease = '1 ms' WHERE state = 'running';
SELECT alive FROM redrive._running_chunks;
ROLLBACK;
SELECT complete('a');
CALL redrive.wait(batch('down'), '30 s');

-- One that lives, renews its lease and settles nothing is stuck after stale_after, or its lease if that is longer.
SELECT submit('bulk', 'stuck', 1);
SELECT count(*) FROM claim('a', 'bulk', 8, '5 min');
UPDATE redrive.chunks SET progress_at = progress_at - interval '9 min' WHERE state = 'running';
SELECT redrive.heartbeat(chunk('a'), token('a')) IS NOT NULL AS renewed;
SELECT s.reason, s.action FROM redrive.stale_batches_at(now()) AS s WHERE s.batch_id = batch('stuck');
UPDATE redrive.chunks SET progress_at = progress_at - interval '2 min' WHERE state = 'running';
SELECT s.reason, s.action FROM redrive.stale_batches_at(now()) AS s WHERE s.batch_id = batch('stuck');
SELECT redrive.heartbeat(chunk('a'), token('a'), '12 min') IS NOT NULL AS renewed;
SELECT s.reason, s.action FROM redrive.stale_batches_at(now()) AS s WHERE s.batch_id = batch('stuck');
SELECT redrive.heartbeat(chunk('a'), token('a'), '5 min') IS NOT NULL AS renewed;
SELECT acted, detail FROM redrive.rescue_stale();
SELECT * FROM claims WHERE state = 'orphaned';
-- Ten times: an item that is alone is not tried again, and its key is unlocked.
UPDATE redrive.chunks SET rescue_count = 9 WHERE state = 'orphaned';
SELECT count(*) FROM claim('a', 'bulk', 8, '1 min');
SELECT acted, detail FROM redrive.rescue_stale(now() + interval '2 min');
CALL redrive.wait(batch('stuck'), '30 s');
SELECT item_no, state, reason, error_class, sqlstate, message, detail, retry_count, attempts FROM redrive.failed_items WHERE batch_id = batch('stuck');
SELECT * FROM progress WHERE label = 'stuck';
SELECT * FROM broken;
-- With others the batch is paused, as for workers of the server.
SELECT submit('bulk', 'ten', 3);
SELECT count(*) FROM claim('a', 'bulk', 8, '1 min');
UPDATE redrive.chunks SET rescue_count = 9 WHERE state = 'running';
SELECT acted, detail FROM redrive.rescue_stale(now() + interval '2 min');
SELECT state, regexp_replace(pause_reason, '\d+', 'N') FROM redrive.batch_progress WHERE label = 'ten';
SELECT redrive.cancel_batch(batch('ten'));
CALL until_ended('ten');
-- A claim that was all settled is no loss.
SELECT submit('bulk', 'not closed', 1);
SELECT count(*) FROM claim('a', 'bulk', 8, '1 min');
SELECT settle('a', outcome(1));
SELECT acted, detail FROM redrive.rescue_stale(now() + interval '2 min');
CALL redrive.wait(batch('not closed'), '30 s');
SELECT * FROM progress WHERE label = 'not closed';
SELECT lost FROM claims WHERE name = 'a';

-- Order: priority, then what has waited longest.  Limits and pauses.
SELECT redrive.create_handler('order', kind => 'external', max_workers => 2, tolerated_failures => 0);
SELECT submit('order', 'low', 2), submit('order', 'high', 1, priority => 1);
SELECT label, item_no FROM claim('a', 'order', 1);
SELECT label, item_no FROM claim('b', 'order', 1);
SELECT label, item_no FROM claim('c', 'order', 1);
SELECT complete('a');
SELECT redrive.pause_handler('order');
SELECT label, item_no FROM claim('c', 'order', 1);
SELECT redrive.resume_handler('order');
SELECT redrive.pause_batch(batch('low'));
SELECT label, item_no FROM claim('c', 'order', 1);
SELECT redrive.resume_batch(batch('low'));
SELECT complete('b', outcome(1, 'failed'));
SELECT label, item_no FROM claim('c', 'order', 1);
SELECT state, pause_reason FROM redrive.batch_progress WHERE label = 'low';
SELECT redrive.resume_batch(batch('low'));
SELECT label, item_no FROM claim('c', 'order', 1);
SELECT complete('c');
CALL redrive.wait(batch('low'), '30 s');
SELECT * FROM progress WHERE label = 'low';
-- Not before its time.
SELECT redrive.send('order', '1', delay => '1 h') > 0;
SELECT count(*) FROM claim('c', 'order', 1);

-- Where it is seen.
CREATE FUNCTION plain(value text) RETURNS text LANGUAGE sql AS $$ SELECT regexp_replace(value, '\d{4}-\d\d-\d\d \d\d:\d\d:\d\d[-+]\d\d(:\d\d)?', 'T', 'g') $$;
CREATE FUNCTION why(label text) RETURNS TABLE (fact text, detail text, remedy text) LANGUAGE sql AS $$
    SELECT w.fact, scratch.plain(w.detail), scratch.plain(w.remedy) FROM redrive.why(scratch.batch(label)) AS w
$$;
\x on
\pset format unaligned
\pset tuples_only on
-- with one snapshot it could not be counted how many there are
BEGIN ISOLATION LEVEL REPEATABLE READ;
SELECT how($$SELECT * FROM redrive.claim('order')$$);
ROLLBACK;
SELECT redrive.create_handler('seen', kind => 'external', max_workers => 1);
SELECT submit('seen', 'seen', 9);
SELECT * FROM why('seen');
SELECT count(*) FROM claim('robot', 'seen', 5);
SELECT settle('robot', outcome(1), outcome(4));
SELECT * FROM why('seen');
-- all is settled, and not ended
BEGIN;
SELECT settle('robot', outcome(2), outcome(3), outcome(5));
SELECT * FROM why('seen');
ROLLBACK;
SELECT pid, kind, handler, state, worker, lease_until > now() AS leased FROM redrive.workers WHERE handler = 'seen';
SELECT workers, ready, in_flight FROM redrive.queue_stats WHERE handler = 'seen';
UPDATE redrive.chunks SET progress_at = progress_at - interval '20 min' WHERE state = 'running';
SELECT * FROM why('seen');
SELECT redrive.pause_handler('seen');
SELECT release('robot');
SELECT * FROM why('seen');
SELECT redrive.resume_handler('seen');
SELECT * FROM why('seen');
SELECT redrive.cancel_batch(batch('seen'));
\pset tuples_only off
\pset format aligned
\x off

-- Who waits sleeps: each look of a handler with max_workers locks it, and gives that up again.
-- Seen red: with a condition variable alone, which the rollback of the look cancels.
SELECT redrive.create_handler('limited', kind => 'external', max_workers => 1);
SELECT pg_snapshot_xmax(pg_current_snapshot()) AS before \gset
SELECT count(*) FROM redrive.claim('limited', wait => '300 ms');
SELECT pg_snapshot_xmax(pg_current_snapshot())::text::bigint - :before < 100 AS sleeps;
SELECT submit('limited', 'limited', 2);
SELECT count(*) FROM redrive.claim('limited', 1);
SELECT pg_snapshot_xmax(pg_current_snapshot()) AS before \gset
SELECT count(*) FROM redrive.claim('limited', 1, wait => '300 ms');
SELECT pg_snapshot_xmax(pg_current_snapshot())::text::bigint - :before < 100 AS sleeps;
SELECT redrive.cancel_batch(batch('limited'));
SELECT redrive.release(chunk_id, lease_token) FROM redrive.chunks WHERE state = 'running' AND batch_id = batch('limited');
SELECT redrive.drop_handler('limited');

-- A claim whose WAL was lost, and the sequences with it: what another one got since has
-- the same number, but not the same token.  Seen red: with tokens from a sequence.
SELECT submit('mail', 'lost WAL', 2);
CREATE TABLE sequences AS SELECT format('redrive.%I', s.sequencename) AS name, s.last_value FROM pg_sequences AS s WHERE s.schemaname = 'redrive' AND s.last_value IS NOT NULL;
BEGIN;
SELECT chunk_id AS lost_chunk, lease_token AS lost_token FROM redrive.claim('mail', 2) LIMIT 1 \gset
ROLLBACK;
SELECT count(setval(s.name::regclass, s.last_value)) > 0 FROM sequences AS s;
SELECT count(*) FROM claim('a', 'mail', 2);
SELECT chunk('a') = :lost_chunk AS same_chunk, token('a') = :lost_token AS same_token;
SELECT left(how($$SELECT redrive.complete($$ || :lost_chunk || ', ' || :lost_token || ')'), 5) AS how LIMIT 1;
SELECT complete('a');
CALL redrive.wait(batch('lost WAL'), '30 s');

-- NOTIFY, for those who ask for it, in the channel redrive_<name>.
SELECT how($$SELECT redrive.create_handler('inside too', 'row_function', notify => true)$$);
SELECT how($$SELECT redrive.create_handler(repeat('n', 56), kind => 'external', notify => true)$$);
SELECT redrive.create_handler('news', kind => 'external');
SELECT notify FROM redrive.handlers WHERE name = 'news';
SELECT redrive.alter_handler('news', notify => true);
SELECT notify FROM redrive.handlers WHERE name = 'news';

-- Others may not.
CREATE ROLE external_owner;
CREATE ROLE external_member IN ROLE external_owner;
CREATE ROLE external_other;
SELECT redrive.grant_user('external_owner'), redrive.grant_user('external_other'), redrive.grant_user('external_member');
GRANT SELECT, INSERT, DELETE ON mine TO PUBLIC;
SET ROLE external_owner;
-- Nobody has to log in as the owner when there are no callbacks.
SELECT redrive.create_handler('theirs', kind => 'external');
SELECT submit('theirs', 'theirs', 3, true);
RESET ROLE;
SET ROLE external_member;
SELECT * FROM claim('member', 'theirs', 2);
RESET ROLE;
SET ROLE external_other;
SELECT how($$SELECT * FROM redrive.claim('theirs')$$);
SELECT how($$SELECT redrive.complete(chunk('member'), token('member'))$$);
SELECT how($$SELECT redrive.complete(chunk('member'), token('member') + 1)$$);
SELECT how($$SELECT redrive.settle(chunk('member'), token('member'), ARRAY[outcome(1, 'retry')])$$);
SELECT how($$SELECT redrive.release(chunk('member'), token('member'))$$);
SELECT how($$SELECT redrive.heartbeat(chunk('member'), token('member'))$$);
SELECT * FROM redrive.workers WHERE handler = 'theirs';
RESET ROLE;
SET ROLE external_member;
SELECT settle('member', outcome(1, 'failed', 'mine'));
SELECT complete('member');
SELECT fact FROM redrive.why(batch('theirs'));
SELECT * FROM progress WHERE label = 'theirs';
RESET ROLE;
SELECT count(*) FROM redrive.locks;
SELECT how($$SELECT redrive.drop_handler('theirs')$$);
SELECT redrive.cancel_batch(batch('theirs'));
SELECT redrive.drop_handler('theirs');

-- A claim holds up the end of its handler, and purge.
SELECT submit('bulk', 'kept', 1);
SELECT count(*) FROM claim('a', 'bulk', 1);
SELECT redrive.cancel_batch(batch('kept'));
SELECT how($$SELECT redrive.drop_handler('bulk')$$);
SELECT release('a');
SELECT redrive.drop_handler('bulk');

DROP OWNED BY external_owner, external_member, external_other;
DROP ROLE external_owner, external_member, external_other;
