-- Execute: what the engine runs, how often, in which order and transaction,
-- with the handler's own table as the truth.
\getenv here PG_ABS_SRCDIR
\set tools :here '/sql/tools.psql'
\i :tools

-- top: the transaction; xmin of a row: the subtransaction that wrote it.
CREATE TABLE done (place bigint GENERATED ALWAYS AS IDENTITY, batch_id bigint, item_no bigint, key text, payload jsonb, attempt int,
    top xid8 DEFAULT pg_current_xact_id(), started timestamptz DEFAULT now());
CREATE SEQUENCE calls;
-- Writes, then fails when the payload says so: what it wrote must be gone.
CREATE FUNCTION take(item redrive.item) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    PERFORM nextval('scratch.calls');
    INSERT INTO scratch.done (batch_id, item_no, key, payload, attempt) VALUES (item.batch_id, item.item_no, item.key, item.payload, item.attempt);
    IF item.payload = '"bad"' THEN
        RAISE EXCEPTION 'bad item %', item.item_no USING ERRCODE = '22000';
    END IF;
END
$$;
SELECT redrive.create_handler('chunk', 'take');
SELECT redrive.create_handler('item', 'take', isolation => 'item');

-- Nothing to do.
CALL redrive.work();

-- Each of 3000 items once, in order, at the first attempt.
SELECT redrive.submit('chunk', array_agg(to_jsonb(i) ORDER BY i), array_agg('k' || i ORDER BY i), label => 'good') > 0 AS submitted FROM generate_series(1, 3000) AS i;
CALL redrive.work();
SELECT count(*), count(DISTINCT item_no), min(item_no), max(item_no), min(attempt), max(attempt), bool_and(payload = to_jsonb(item_no)) AS payloads, bool_and(key = 'k' || item_no) AS keys FROM done;
SELECT count(*) AS out_of_order FROM (SELECT item_no, lag(item_no) OVER (ORDER BY place) AS before FROM done) AS d WHERE before >= item_no;
SELECT last_value AS calls FROM calls;
SELECT * FROM progress;
SELECT label, percent_done, started_at >= created_at AS started, finished_at >= started_at AS finished, time_left FROM redrive.batch_progress;
SELECT count(*) AS failures FROM redrive.failures;
SELECT count(*) AS locks FROM redrive.locks;
SELECT * FROM broken;

-- Payloads and keys come through as they are.
DELETE FROM done;
CREATE TABLE given (item_no bigint GENERATED ALWAYS AS IDENTITY, key text, payload jsonb);
INSERT INTO given (key, payload) VALUES
    ('', '""'), (' ', 'null'), (NULL, 'true'), ('a"b', '{}'), ('a\b', '[]'), ('a,b', '[[[]]]'), ('{}', '{"": ""}'),
    ('NULL', '"NULL"'), ('null', '"null"'), (E'line\nbreak', '"line\nbreak\ttab\"quote\\back/slash"'),
    ('žluťoučký', '"\u017elu\u0165ou\u010dk\u00fd"'), ('表', '"\u8868 \ud83d\ude00"'), (E'\u0001', '"\u0001\u001f"'),
    ('number', '-1.50e-300'), ('digits', to_jsonb(repeat('9', 1000)::numeric)), ('zero', '-0.0'),
    ('keys', '{"b": 1, "a": {"b": [1, {"c": null}], "a": "x"}, "aa": 2}'),
    ('deep', (repeat('[', 1000) || repeat(']', 1000))::jsonb),
    ('deep object', (repeat('{"a":', 500) || '0' || repeat('}', 500))::jsonb),
    ('wide', (SELECT jsonb_object_agg('k' || i, i) FROM generate_series(1, 2000) AS i)),
    ('$$; DROP TABLE done', '"''; DROP TABLE done --"');
SELECT redrive.submit('chunk', array_agg(payload ORDER BY item_no), array_agg(key ORDER BY item_no), label => 'edges') > 0 AS submitted FROM given;
CALL redrive.work();
SELECT count(*) AS items, count(*) FILTER (WHERE d.payload::text = g.payload::text AND d.key IS NOT DISTINCT FROM g.key) AS same
FROM given AS g LEFT JOIN done AS d USING (item_no);
SELECT * FROM broken;

-- Many failing items, from none to all: the good ones are there once, the bad
-- ones not at all, and each bad one has a failure.
CREATE TABLE wanted (share numeric, isolation text, item_no bigint, bad boolean);
INSERT INTO wanted (share, isolation, item_no, bad)
SELECT s, i, n, (n * 7919) % 1000 < s * 10 FROM unnest(ARRAY[0, 0.1, 1, 10, 50, 90, 100]) AS s, unnest(ARRAY['chunk', 'item']) AS i, generate_series(1, 1000) AS n;
SELECT count(redrive.submit(isolation, p, label => isolation || ' ' || share || ' %')) AS submitted
FROM (SELECT isolation, share, array_agg(CASE WHEN bad THEN '"bad"' ELSE '"good"' END::jsonb ORDER BY item_no) AS p FROM wanted GROUP BY isolation, share ORDER BY isolation, share) AS x;
DELETE FROM done;
ALTER SEQUENCE calls RESTART;
CALL redrive.work();
SELECT w.isolation, w.share, count(*) FILTER (WHERE w.bad) AS bad, b.succeeded, b.failed, count(*) FILTER (WHERE d.times = 1) AS there_once,
    count(*) FILTER (WHERE coalesce(d.times, 0) <> (NOT w.bad)::int) AS wrong, count(*) FILTER (WHERE (f.item_no IS NOT NULL) <> w.bad) AS wrong_failures
FROM wanted AS w
JOIN redrive.batch_progress AS b ON b.label = w.isolation || ' ' || w.share || ' %'
LEFT JOIN (SELECT batch_id, item_no, count(*) AS times FROM done GROUP BY batch_id, item_no) AS d ON d.batch_id = b.batch_id AND d.item_no = w.item_no
LEFT JOIN redrive.failed_items AS f ON f.batch_id = b.batch_id AND f.item_no = w.item_no
GROUP BY w.isolation, w.share, b.batch_id, b.succeeded, b.failed
ORDER BY w.isolation, w.share;
SELECT count(*) AS out_of_order
FROM (SELECT item_no, lag(item_no) OVER (PARTITION BY batch_id ORDER BY place) AS before FROM done) AS d WHERE before >= item_no;
SELECT DISTINCT state, reason, error_class, sqlstate, retry_count, attempts FROM redrive.failed_items;
SELECT count(*) AS wrong_messages FROM redrive.failed_items WHERE message <> 'bad item ' || item_no;
SELECT * FROM broken;

-- isolation => 'item': a transaction of its own for each item, and no item runs
-- twice, whatever the others do.
SELECT count(*) AS good, count(DISTINCT top) = count(*) AS own_transaction
FROM done WHERE batch_id IN (SELECT batch_id FROM redrive.batch_progress WHERE handler = 'item');
DELETE FROM done;
ALTER SEQUENCE calls RESTART;
SELECT redrive.submit('item', array_agg(CASE WHEN i % 3 = 0 THEN '"bad"' ELSE '"good"' END::jsonb ORDER BY i), label => 'once') > 0 AS submitted FROM generate_series(1, 300) AS i;
CALL redrive.work();
SELECT last_value AS calls FROM calls;
SELECT * FROM progress WHERE label = 'once';
-- Otherwise an item runs at most twice: once for nothing, and once for good.
ALTER SEQUENCE calls RESTART;
SELECT redrive.submit('chunk', array_agg(CASE WHEN i % 3 = 0 THEN '"bad"' ELSE '"good"' END::jsonb ORDER BY i), label => 'twice') > 0 AS submitted FROM generate_series(1, 300) AS i;
CALL redrive.work();
SELECT last_value BETWEEN 300 AND 600 AS at_most_twice FROM calls;
SELECT * FROM progress WHERE label = 'twice';

-- Few transaction ids: one per commit and segment, not one per item; and no
-- transaction has more than 50 subtransactions that live.
DELETE FROM done;
SELECT redrive.submit('chunk', array_agg(to_jsonb(i)), label => 'xids') > 0 AS submitted FROM generate_series(1, 5000) AS i;
SELECT pg_snapshot_xmax(pg_current_snapshot())::text::bigint AS before \gset
CALL redrive.work();
SELECT count(*) AS items FROM done;
SELECT pg_snapshot_xmax(pg_current_snapshot())::text::bigint - :before < 300 AS few_xids;
SELECT count(DISTINCT xmin::text) < 200 AS few_segments, count(DISTINCT top) < 60 AS few_transactions FROM done;
SELECT bool_and(n <= 50) AS at_most_50 FROM (SELECT count(DISTINCT xmin::text) AS n FROM done GROUP BY top) AS t;
SELECT redrive.submit('chunk', array_agg(CASE WHEN i % 2 = 0 THEN '"bad"' ELSE '"good"' END::jsonb ORDER BY i), label => 'half') > 0 AS submitted FROM generate_series(1, 2000) AS i;
DELETE FROM done;
CALL redrive.work();
SELECT count(*) AS items FROM done;
SELECT bool_and(n <= 50) AS at_most_50 FROM (SELECT count(DISTINCT xmin::text) AS n FROM done GROUP BY top) AS t;
SELECT * FROM broken;

-- now() is that of the commit interval.
SELECT redrive.create_handler('short', 'take', commit_interval => '1 ms');
DELETE FROM done;
SELECT redrive.submit('short', array_agg(to_jsonb(i)), label => 'short') > 0 AS submitted FROM generate_series(1, 2000) AS i;
CALL redrive.work();
SELECT count(*) AS items, count(DISTINCT started) > 5 AS many_times, count(DISTINCT started) = count(DISTINCT top) AS one_per_transaction FROM done;
SELECT count(*) AS backwards FROM (SELECT started, lag(started) OVER (ORDER BY place) AS before FROM done) AS d WHERE before > started;

-- What a handler sets does not reach the next item, the bookkeeping or the caller.
CREATE ROLE regress_execute_other;
CREATE TABLE seen (item_no bigint, search_path text, setting text, work_mem text, role text, message_level text, caught text);
CREATE FUNCTION set_things(item redrive.item) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    v_caught text;
BEGIN
    INSERT INTO scratch.seen VALUES (item.item_no, current_setting('search_path'), coalesce(current_setting('my.setting', true), ''), current_setting('work_mem'), current_user, current_setting('client_min_messages'));
    PERFORM set_config('my.setting', 'left over', false);
    SET search_path = pg_temp, nowhere;
    SET LOCAL work_mem = '123MB';
    SET SESSION client_min_messages = 'error';
    BEGIN
        SET ROLE regress_execute_other;
    EXCEPTION WHEN OTHERS THEN
        v_caught := SQLSTATE || ': ' || SQLERRM;
    END;
    BEGIN
        SET SESSION AUTHORIZATION regress_execute_other;
    EXCEPTION WHEN OTHERS THEN
        v_caught := v_caught || '; ' || SQLSTATE || ': ' || SQLERRM;
    END;
    UPDATE scratch.seen SET caught = v_caught WHERE seen.item_no = item.item_no;
END
$$;
SHOW search_path;
SHOW work_mem;
SELECT redrive.create_handler('sets', 'set_things');
SELECT redrive.submit('sets', ARRAY['1', '2', '3']::jsonb[], label => 'sets') > 0 AS submitted;
CALL redrive.work();
SELECT item_no, search_path, setting, work_mem, role = current_user AS same_role, message_level, caught FROM seen ORDER BY item_no;
SHOW search_path;
SHOW work_mem;
SHOW client_min_messages;
SELECT current_setting('my.setting', true) IS DISTINCT FROM 'left over' AS not_left_over;
SELECT * FROM progress WHERE label = 'sets';
SELECT * FROM broken;
DROP ROLE regress_execute_other;

-- Temporary tables named like ours, functions and operators first in search_path.
CREATE FUNCTION plant(payload jsonb) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    CREATE TEMP TABLE IF NOT EXISTS chunks (chunk_id bigint, state text);
    CREATE TEMP TABLE IF NOT EXISTS failures (LIKE redrive.failures);
    CREATE TEMP TABLE IF NOT EXISTS batches (LIKE redrive.batches);
    SET search_path = scratch, pg_catalog;
    IF payload = '"bad"' THEN
        RAISE EXCEPTION 'bad' USING ERRCODE = '22000';
    END IF;
END
$$;
CREATE FUNCTION scratch.clock_timestamp() RETURNS timestamptz LANGUAGE sql AS $$ SELECT '1999-01-01'::timestamptz $$;
SELECT redrive.create_handler('plants', 'plant');
SELECT redrive.submit('plants', ARRAY['1', '"bad"', '3']::jsonb[], ARRAY['a', 'b', 'c'], label => 'plants') > 0 AS submitted;
SET client_min_messages = warning;
CALL redrive.work();
RESET client_min_messages;
SELECT * FROM progress WHERE label = 'plants';
SELECT (SELECT count(*) FROM pg_temp.chunks) AS chunks, (SELECT count(*) FROM pg_temp.failures) AS failures, (SELECT count(*) FROM pg_temp.batches) AS batches;
SELECT finished_at > '2000-01-01' AS our_clock FROM redrive.batch_progress WHERE label = 'plants';
SELECT * FROM broken;
DROP TABLE pg_temp.chunks, pg_temp.failures, pg_temp.batches;
DROP FUNCTION scratch.clock_timestamp();

-- Deferred constraints: the error belongs to the item that caused it, and good
-- items may rely on the deferral.
CREATE TABLE parent (id int PRIMARY KEY);
CREATE TABLE child (id int, parent int CONSTRAINT child_parent REFERENCES parent DEFERRABLE INITIALLY DEFERRED);
CREATE FUNCTION link(payload jsonb) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO scratch.child VALUES (payload::int, payload::int);
    IF payload::int % 10 <> 5 THEN
        INSERT INTO scratch.parent VALUES (payload::int);
    END IF;
END
$$;
SELECT redrive.create_handler('links', 'link', retry_delay => '1 h');
SELECT redrive.submit('links', array_agg(to_jsonb(i) ORDER BY i), label => 'links') > 0 AS submitted FROM generate_series(1, 100) AS i;
CALL redrive.work();
SELECT * FROM progress WHERE label = 'links';
SELECT count(*), count(*) FILTER (WHERE id % 10 = 5) AS bad FROM child;
SELECT item_no, state, error_class, sqlstate, constraint_name, message FROM redrive.failed_items WHERE batch_id = batch('links') ORDER BY item_no LIMIT 3;
SELECT * FROM broken;
-- The parents arrive.
INSERT INTO parent SELECT i FROM generate_series(5, 95, 10) AS i;
ALTER TABLE parent ADD UNIQUE (id);
CREATE OR REPLACE FUNCTION link(payload jsonb) RETURNS void LANGUAGE sql AS 'INSERT INTO scratch.child VALUES (payload::int, payload::int)';
CALL make_due();
CALL redrive.work();
SELECT * FROM progress WHERE label = 'links';
SELECT count(*) FROM child;
SELECT * FROM broken;
-- A deferred trigger that fails at once for each.
CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'refused at the end' USING ERRCODE = '22000'; END $$;
CREATE CONSTRAINT TRIGGER refuse AFTER INSERT ON child DEFERRABLE INITIALLY DEFERRED FOR EACH ROW WHEN (new.id % 2 = 0) EXECUTE FUNCTION refuse();
SELECT redrive.submit('links', array_agg(to_jsonb(i) ORDER BY i), label => 'refused') > 0 AS submitted FROM generate_series(1, 50) AS i;
CALL redrive.work();
SELECT * FROM progress WHERE label = 'refused';
SELECT DISTINCT state, reason, message FROM redrive.failed_items WHERE batch_id = batch('refused');
SELECT * FROM broken;

-- A handler submits: its batch lives and dies with the item.
CREATE FUNCTION chain(payload jsonb) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    PERFORM redrive.send('chunk', payload, 'chain ' || payload::text);
    IF payload::int % 2 = 0 THEN
        RAISE EXCEPTION 'even' USING ERRCODE = '22000';
    END IF;
END
$$;
SELECT redrive.create_handler('chains', 'chain');
SELECT redrive.submit('chains', array_agg(to_jsonb(i) ORDER BY i), label => 'chains') > 0 AS submitted FROM generate_series(1, 10) AS i;
DELETE FROM done;
CALL redrive.work();
SELECT key, payload FROM done ORDER BY place;
SELECT * FROM progress WHERE label = 'chains';
SELECT * FROM broken;

-- A handler that ends the transaction, or calls the engine, only fails.
CREATE FUNCTION bad_manners(payload jsonb) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    v_state redrive.batch_state;
BEGIN
    CASE payload ->> 0
        WHEN 'commit' THEN COMMIT;
        WHEN 'rollback' THEN ROLLBACK;
        WHEN 'work' THEN CALL redrive.work();
        WHEN 'wait' THEN CALL redrive.wait(1, '1 s', v_state);
        WHEN 'constraints' THEN SET CONSTRAINTS ALL DEFERRED;
        WHEN 'savepoint' THEN
            BEGIN
                PERFORM 1 / 0;
            EXCEPTION WHEN division_by_zero THEN
                NULL;
            END;
    END CASE;
END
$$;
SELECT redrive.create_handler('manners', 'bad_manners', max_retries => 0);
SELECT redrive.submit('manners', ARRAY['["commit"]', '["rollback"]', '["work"]', '["wait"]', '["constraints"]', '["savepoint"]', '["none of them"]', 'null']::jsonb[], label => 'manners') > 0 AS submitted;
CALL redrive.work();
SELECT item_no, state, reason, sqlstate, message FROM redrive.failed_items WHERE batch_id = batch('manners') ORDER BY item_no;
SELECT * FROM progress WHERE label = 'manners';
SELECT * FROM broken;

-- The whole error is kept.
CREATE FUNCTION full_error(payload jsonb) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION 'the message' USING ERRCODE = '22000', DETAIL = 'the detail', HINT = 'the hint', CONSTRAINT = 'the constraint';
END
$$;
SELECT redrive.create_handler('full error', 'full_error');
SELECT redrive.submit('full error', ARRAY['1']::jsonb[], ARRAY['the key'], label => 'full error') > 0 AS submitted;
CALL redrive.work();
\x
SELECT item_no, key, state, reason, error_class, sqlstate, message, detail, hint, context, constraint_name, retry_count, attempts
FROM redrive.failed_items WHERE batch_id = batch('full error');
\x

-- An error in the bookkeeping is told as it is; what was good before it is kept,
-- the chunk is given back, and the work goes on when the cause is gone.
CREATE FUNCTION boom(bigint) RETURNS int LANGUAGE sql IMMUTABLE RETURN 0;
CREATE FUNCTION boom() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'boom'; END $$;
CREATE INDEX boom ON redrive.failures (boom(item_no));
CREATE OR REPLACE FUNCTION boom(bigint) RETURNS int LANGUAGE plpgsql IMMUTABLE AS $$ BEGIN RAISE EXCEPTION 'boom'; END $$;
DELETE FROM done;
SELECT redrive.submit('chunk', ARRAY['"good"', '"bad"', '"good"']::jsonb[], ARRAY['b1', 'b2', 'b3'], label => 'boom') > 0 AS submitted;
\set VERBOSITY terse
CALL redrive.work();
\set VERBOSITY default
SELECT item_no FROM done ORDER BY item_no;
SELECT * FROM progress WHERE label = 'boom';
SELECT * FROM broken;
DROP INDEX redrive.boom;
DROP FUNCTION boom(bigint);
CREATE TRIGGER boom BEFORE UPDATE ON redrive.classification_rules FOR EACH ROW EXECUTE FUNCTION boom();
\set VERBOSITY terse
CALL redrive.work();
\set VERBOSITY default
SELECT item_no FROM done ORDER BY item_no;
SELECT * FROM broken;
DROP TRIGGER boom ON redrive.classification_rules;
SELECT outcome FROM redrive.rescue_stale(now() + interval '2 min');
SELECT * FROM progress WHERE label = 'boom';
SELECT * FROM broken;

-- The procedure itself: it commits, so it stands alone.
BEGIN;
CALL redrive.work();
\echo :SQLSTATE
ROLLBACK;
DO $$ BEGIN CALL redrive.work(); END $$;
SELECT fails('CALL redrive.work()');
-- Time: none at all, a little, and not until idle.
SELECT redrive.submit('chunk', ARRAY['1']::jsonb[], label => 'time') > 0 AS submitted;
CALL redrive.work('0');
SELECT state FROM progress WHERE label = 'time';
CALL redrive.work('-1 s');
SELECT state FROM progress WHERE label = 'time';
CALL redrive.work(max_time => '100 ms', until_idle => false);
SELECT state FROM progress WHERE label = 'time';
CALL redrive.work(NULL, NULL);
-- max_workers counts this session too.
SELECT redrive.alter_handler('chunk', max_workers => 1);
SELECT redrive.submit('chunk', array_agg(to_jsonb(i)), label => 'one worker') > 0 AS submitted FROM generate_series(1, 500) AS i;
CALL redrive.work();
SELECT * FROM progress WHERE label = 'one worker';

-- It runs the handlers of the current role, and no other's.
CREATE ROLE regress_execute_a LOGIN;
CREATE ROLE regress_execute_b LOGIN;
SELECT redrive.grant_user('regress_execute_a');
SELECT redrive.grant_user('regress_execute_b');
CREATE TABLE who (handler text, role text);
GRANT INSERT ON who TO regress_execute_a, regress_execute_b;
CREATE FUNCTION note(payload jsonb) RETURNS void LANGUAGE sql AS $$ INSERT INTO scratch.who VALUES (payload ->> 0, current_user || ', ' || session_user) $$;
SET SESSION AUTHORIZATION regress_execute_a;
SELECT redrive.create_handler('of a', 'note');
SELECT redrive.submit('of a', ARRAY['["a"]']::jsonb[], label => 'of a') > 0 AS submitted;
SET SESSION AUTHORIZATION regress_execute_b;
SELECT redrive.create_handler('of b', 'note');
SELECT redrive.submit('of b', ARRAY['["b"]']::jsonb[], label => 'of b') > 0 AS submitted;
CALL redrive.work();
RESET SESSION AUTHORIZATION;
CALL redrive.work();
SELECT * FROM who;
SET SESSION AUTHORIZATION regress_execute_a;
CALL redrive.work();
RESET SESSION AUTHORIZATION;
SELECT * FROM who ORDER BY handler;
SELECT * FROM progress WHERE label LIKE 'of %';
-- Without EXECUTE.
SELECT redrive.revoke_user('regress_execute_b');
SET SESSION AUTHORIZATION regress_execute_b;
CALL redrive.work();
RESET SESSION AUTHORIZATION;
SELECT * FROM broken;
SELECT redrive.drop_handler('of a');
SELECT redrive.drop_handler('of b');
DROP OWNED BY regress_execute_a, regress_execute_b;
DROP ROLE regress_execute_a, regress_execute_b;

-- An item that fails when the time of its interval is over is not run again for
-- that: those before it are replayed first, without a look at the clock.
CREATE SEQUENCE late_calls;
CREATE FUNCTION late(item redrive.item) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    IF item.item_no = 4 THEN
        PERFORM nextval('scratch.late_calls'), pg_sleep(0.1); -- slow handler
        RAISE 'late';
    END IF;
END
$$;
SELECT redrive.create_handler('late', 'late', commit_interval => '50 ms', max_retries => 0);
SELECT redrive.submit('late', ARRAY['1', '2', '3', '4', '5']::jsonb[], label => 'late') > 0 AS submitted;
CALL redrive.work();
SELECT * FROM progress WHERE label = 'late';
SELECT last_value AS calls FROM late_calls;
SELECT redrive.drop_handler('late');
