-- Control: pause, resume and cancel, in each state; wait.
\getenv here PG_ABS_SRCDIR
\set tools :here '/sql/tools.psql'
\i :tools

CREATE TABLE done (item_no bigint, payload jsonb);
CREATE FUNCTION take(item redrive.item) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO scratch.done VALUES (item.item_no, item.payload);
    CASE item.payload ->> 0
        WHEN 'pause' THEN PERFORM redrive.pause_batch(item.batch_id);
        WHEN 'cancel' THEN PERFORM redrive.cancel_batch(item.batch_id);
        WHEN 'fail' THEN RAISE EXCEPTION 'told to';
        WHEN 'reject' THEN RAISE EXCEPTION 'told to' USING ERRCODE = '22000';
        ELSE NULL;
    END CASE;
END
$$;
SELECT redrive.create_handler('h', 'take', retry_delay => '1 h');
CREATE VIEW locked AS SELECT key FROM redrive.locks ORDER BY key;

-- A batch that was not started: pause, resume, cancel.
SELECT redrive.submit('h', ARRAY['1', '2']::jsonb[], ARRAY['a', 'b'], label => 'ready') > 0 AS submitted;
SELECT redrive.pause_batch(batch('ready'));
SELECT label, state, pause_reason = 'paused by ' || current_user AS by_me FROM redrive.batch_progress;
CALL redrive.work();
SELECT * FROM progress;
SELECT * FROM locked;
SELECT fails(format('SELECT redrive.pause_batch(%s)', batch('ready')));
SELECT redrive.resume_batch(batch('ready'));
SELECT label, state, pause_reason FROM redrive.batch_progress;
SELECT fails(format('SELECT redrive.resume_batch(%s)', batch('ready')));
SELECT redrive.cancel_batch(batch('ready'));
SELECT * FROM progress;
SELECT label, state, percent_done, started_at, finished_at IS NOT NULL AS finished FROM redrive.batch_progress;
SELECT * FROM locked;
SELECT item_no, state FROM redrive.item_status ORDER BY item_no;
CALL redrive.work();
SELECT count(*) FROM done;
SELECT * FROM broken;
SELECT fails(format('SELECT redrive.cancel_batch(%s)', batch('ready')));
SELECT fails(format('SELECT redrive.pause_batch(%s)', batch('ready')));
SELECT fails(format('SELECT redrive.resume_batch(%s)', batch('ready')));

-- One that is open.
SELECT redrive.open_batch('h', label => 'open') > 0 AS opened;
SELECT redrive.add_items(batch('open'), ARRAY['1', '2']::jsonb[], ARRAY['a', 'b']);
SELECT fails(format('SELECT redrive.pause_batch(%s)', batch('open')));
SELECT fails(format('SELECT redrive.resume_batch(%s)', batch('open')));
SELECT redrive.cancel_batch(batch('open'));
SELECT * FROM progress WHERE label = 'open';
SELECT * FROM locked;
SELECT * FROM broken;

-- One whose items wait for a retry: nothing runs while it is paused, though due.
SELECT redrive.submit('h', ARRAY['["fail"]', '["good"]', '["reject"]', '["fail"]']::jsonb[], ARRAY['a', 'b', 'c', NULL], label => 'retrying') > 0 AS submitted;
CALL redrive.work();
SELECT * FROM progress WHERE label = 'retrying';
SELECT redrive.pause_batch(batch('retrying'));
CALL make_due();
CALL redrive.work();
SELECT item_no, state, attempts FROM redrive.failed_items WHERE batch_id = batch('retrying') ORDER BY item_no;
SELECT * FROM progress WHERE label = 'retrying';
SELECT redrive.resume_batch(batch('retrying'));
SELECT * FROM progress WHERE label = 'retrying';
CALL redrive.work();
SELECT item_no, state, attempts FROM redrive.failed_items WHERE batch_id = batch('retrying') ORDER BY item_no;
SELECT * FROM locked;
SELECT redrive.cancel_batch(batch('retrying'));
SELECT * FROM progress WHERE label = 'retrying';
SELECT item_no, state FROM redrive.item_status WHERE batch_id = batch('retrying') ORDER BY item_no;
SELECT item_no, state, reason, next_attempt_at FROM redrive.failed_items WHERE batch_id = batch('retrying') ORDER BY item_no;
SELECT * FROM locked;
SELECT * FROM broken;
CALL make_due();
CALL redrive.work();
SELECT * FROM progress WHERE label = 'retrying';

-- One that runs: the interval ends, the rest is kept or cancelled.
SELECT redrive.alter_handler('h', isolation => 'item');
DELETE FROM done;
SELECT redrive.submit('h', ARRAY['["good"]', '["pause"]', '["good"]', '["cancel"]', '["good"]', '["good"]']::jsonb[], ARRAY['a', 'b', 'c', 'd', 'e', NULL], label => 'running') > 0 AS submitted;
CALL redrive.work();
SELECT * FROM progress WHERE label = 'running';
SELECT * FROM done ORDER BY item_no;
SELECT item_no, state FROM redrive.item_status WHERE batch_id = batch('running') ORDER BY item_no;
SELECT * FROM locked;
SELECT * FROM broken;
SELECT redrive.resume_batch(batch('running'));
CALL redrive.work();
SELECT * FROM progress WHERE label = 'running';
SELECT label, state, finished_at IS NOT NULL AS finished FROM redrive.batch_progress WHERE label = 'running';
SELECT * FROM done ORDER BY item_no;
SELECT item_no, state FROM redrive.item_status WHERE batch_id = batch('running') ORDER BY item_no;
SELECT * FROM locked;
SELECT * FROM broken;
-- A failing item cannot pause or cancel: that is rolled back with it.
SELECT redrive.alter_handler('h', isolation => 'chunk');
CREATE FUNCTION cancel_and_fail(item redrive.item) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    PERFORM redrive.cancel_batch(item.batch_id);
    RAISE EXCEPTION 'not cancelled' USING ERRCODE = '22000';
END
$$;
SELECT redrive.create_handler('half', 'cancel_and_fail');
SELECT redrive.submit('half', ARRAY['1', '2']::jsonb[], label => 'half') > 0 AS submitted;
CALL redrive.work();
SELECT * FROM progress WHERE label = 'half';
-- Several chunks: what no worker had is cancelled too.
DELETE FROM done;
SELECT redrive.alter_handler('h', isolation => 'item');
SELECT redrive.submit('h', array_agg(CASE WHEN i = 700 THEN '["cancel"]' ELSE '["good"]' END::jsonb ORDER BY i), array_agg('k' || i ORDER BY i), label => 'chunks') > 0 AS submitted FROM generate_series(1, 2000) AS i;
CALL redrive.work();
SELECT * FROM progress WHERE label = 'chunks';
SELECT count(*), max(item_no) FROM done;
SELECT state, count(*), min(item_no), max(item_no) FROM redrive.item_status WHERE batch_id = batch('chunks') GROUP BY state ORDER BY state;
SELECT * FROM locked;
SELECT * FROM broken;

-- A finished batch, an unknown one, somebody else's.
SELECT redrive.submit('h', ARRAY['1']::jsonb[], label => 'finished') > 0 AS submitted;
CALL redrive.work();
SELECT fails(format('SELECT redrive.pause_batch(%s)', batch('finished')));
SELECT fails(format('SELECT redrive.resume_batch(%s)', batch('finished')));
SELECT fails(format('SELECT redrive.cancel_batch(%s)', batch('finished')));
SELECT f, x.* FROM unnest(ARRAY['pause_batch', 'resume_batch', 'cancel_batch']) AS f, unnest(ARRAY['-1', 'NULL']) AS b, LATERAL fails(format('SELECT redrive.%I(%s)', f, b)) WITH ORDINALITY AS x (answer, line) ORDER BY f, b, line;
CREATE ROLE regress_control_a LOGIN;
SELECT redrive.grant_user('regress_control_a');
SET SESSION AUTHORIZATION regress_control_a;
SELECT f, x.* FROM unnest(ARRAY['pause_batch', 'resume_batch', 'cancel_batch']) AS f, LATERAL fails(format('SELECT redrive.%I(%s)', f, batch('finished'))) WITH ORDINALITY AS x (answer, line) ORDER BY f, line;
SELECT batch('finished') AS b \gset
CALL redrive.wait(:b);
\echo :SQLSTATE
RESET SESSION AUTHORIZATION;
DROP OWNED BY regress_control_a;
DROP ROLE regress_control_a;
-- All of it is the caller's transaction.
SELECT redrive.submit('h', ARRAY['1']::jsonb[], ARRAY['a'], label => 'rolled back') > 0 AS submitted;
BEGIN;
SELECT redrive.cancel_batch(batch('rolled back'));
SELECT redrive.is_locked('h', 'a') AS locked;
ROLLBACK;
SELECT redrive.is_locked('h', 'a') AS locked;
BEGIN;
SELECT redrive.pause_batch(batch('rolled back'));
ROLLBACK;
SELECT * FROM progress WHERE label = 'rolled back';

-- wait: ended batches answer at once, in each way of ending.
SELECT batch('finished') AS b \gset
CALL redrive.wait(:b);
CALL redrive.wait(:b, '0');
CALL redrive.wait(:b, NULL, NULL);
SELECT batch('ready') AS b \gset
CALL redrive.wait(:b, '1 min');
SELECT batch('rolled back') AS b \gset
SELECT redrive.pause_batch(:b);
CALL redrive.wait(:b);
SELECT redrive.resume_batch(:b);
-- Out of time; and no workers to wait for.
CALL redrive.wait(:b, '0');
CALL redrive.wait(:b, '-1 s');
CALL redrive.wait(:b, '1 min');
\echo :SQLSTATE
CALL redrive.wait(:b);
\echo :SQLSTATE
CALL redrive.wait(NULL);
\echo :SQLSTATE
CALL redrive.wait(-1);
\echo :SQLSTATE
BEGIN;
CALL redrive.wait(:b);
\echo :SQLSTATE
ROLLBACK;
CALL redrive.work();
CALL redrive.wait(:b);
SELECT * FROM broken;
