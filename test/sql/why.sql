-- Why: each reason for which a batch does not move, and who may ask.  Reasons
-- that need workers are in test/t/021_why.pl.
\getenv here PG_ABS_SRCDIR
\set tools :here '/sql/tools.psql'
\i :tools

-- Times, pids and the superuser vary.
CREATE FUNCTION plain(value text) RETURNS text LANGUAGE sql AS $$
    SELECT regexp_replace(regexp_replace(regexp_replace(regexp_replace(value, '\d{4}-\d\d-\d\d \d\d:\d\d:\d\d[-+]\d\d(:\d\d)?', 'T', 'g'), '(\m[Pp]id |cancel_backend\()\d+', '\1N', 'g'),
        'oid \d+', 'oid N', 'g'), '\m' || (SELECT rolname FROM pg_roles WHERE oid = 10) || '\M', 'SUPERUSER', 'g')
$$;
CREATE FUNCTION why(label text) RETURNS TABLE (fact text, detail text, remedy text) LANGUAGE sql AS $$
    SELECT w.fact, scratch.plain(w.detail), scratch.plain(w.remedy) FROM redrive.why(scratch.batch(label)) AS w
$$;
CREATE TABLE asked (fact text, detail text, remedy text);
CREATE FUNCTION take(item redrive.item) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    CASE item.payload ->> 0
        WHEN 'fail' THEN RAISE EXCEPTION 'told to';
        WHEN 'reject' THEN RAISE EXCEPTION 'told to' USING ERRCODE = '22000';
        WHEN 'defect' THEN RAISE EXCEPTION 'secret defect' USING ERRCODE = '42P01';
        WHEN 'pause' THEN PERFORM redrive.pause_batch(item.batch_id);
        WHEN 'ask' THEN INSERT INTO scratch.asked SELECT * FROM redrive.why(item.batch_id);
        ELSE NULL;
    END CASE;
END
$$;
CREATE FUNCTION bad_callback(key text) RETURNS void LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'secret of %', key; END $$;
CREATE FUNCTION bad_end(batch_id bigint, run_no int) RETURNS void LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'cannot end'; END $$;
\x on
\pset format unaligned
\pset tuples_only on
SELECT redrive.create_handler('h', 'take', retry_delay => '1 h', isolation => 'item');

-- Open; sealed and empty; not due; due, but without workers.
SELECT redrive.open_batch('h', label => 'open') > 0 AS opened;
SELECT redrive.add_items(batch('open'), ARRAY['1', '2']::jsonb[]);
SELECT * FROM why('open');
SELECT redrive.open_batch('h', label => 'empty') > 0 AS opened;
SELECT redrive.seal_batch(batch('empty'));
SELECT * FROM why('empty');
SELECT redrive.submit('h', ARRAY['1']::jsonb[], run_at => now() + interval '1 day', label => 'later') > 0 AS submitted;
SELECT * FROM why('later');
SELECT redrive.submit('h', ARRAY['["good"]', '["good"]']::jsonb[], label => 'ready') > 0 AS submitted;
SELECT * FROM why('ready');

-- Paused: the batch, the handler, both; a rule; too many failures.
SELECT redrive.pause_handler('h');
SELECT * FROM why('ready');
SELECT redrive.pause_batch(batch('ready'));
SELECT * FROM why('ready');
SELECT redrive.resume_batch(batch('ready'));
SELECT redrive.resume_handler('h');
SELECT redrive.submit('h', ARRAY['["defect"]']::jsonb[], label => 'defect', priority => 1) > 0 AS submitted;
SELECT redrive.create_handler('careful', 'take', tolerated_failures => 1, isolation => 'item');
SELECT redrive.submit('careful', ARRAY['["reject"]', '["reject"]', '["pause"]', '["good"]']::jsonb[], label => 'tolerated') > 0 AS submitted;
CALL redrive.work();
SELECT * FROM why('defect');
SELECT redrive.resume_batch(batch('tolerated'));
SELECT redrive.submit('careful', ARRAY['["reject"]', '["reject"]', '["fail"]']::jsonb[], label => 'too many') > 0 AS submitted;
CALL redrive.work();
SELECT * FROM why('too many');

-- Ended: well, with failures, cancelled; failed items whose keys others have.
SELECT * FROM why('ready');
SELECT * FROM why('tolerated');
SELECT redrive.cancel_batch(batch('later'));
SELECT * FROM why('later');
SELECT redrive.submit('h', ARRAY['["reject"]', '["reject"]']::jsonb[], ARRAY['a', 'b'], label => 'keys') > 0 AS submitted;
CALL redrive.work();
SELECT redrive.submit('h', ARRAY['1', '2']::jsonb[], ARRAY['a', 'b'], run_at => now() + interval '1 day', label => 'holder') > 0 AS submitted;
SELECT * FROM why('keys');

-- Waiting: all of it for a time, a part of it, for the pass, and the time was lost.
SELECT redrive.submit('h', ARRAY['["good"]', '["fail"]', '["fail"]']::jsonb[], label => 'retry') > 0 AS submitted;
SELECT redrive.submit('h', ARRAY['["fail"]', '["pause"]', '["good"]']::jsonb[], label => 'in part') > 0 AS submitted;
SELECT redrive.create_handler('pass', 'take', retry_delay => NULL);
SELECT redrive.submit('pass', ARRAY['["fail"]', '["fail"]', '["good"]']::jsonb[], label => 'pass') > 0 AS submitted;
CALL redrive.work();
SELECT * FROM why('retry');
SELECT redrive.resume_batch(batch('in part'));
SELECT * FROM why('in part');
SELECT * FROM why('pass');
SELECT pass FROM redrive.retry_failed(now() - interval '1 year');
SELECT * FROM why('pass');
UPDATE redrive.batches SET next_retry_at = NULL WHERE label = 'retry';
SELECT fact, remedy FROM why('retry');
SELECT acted FROM redrive.retry_failed(now() + interval '1 h 1 min');
SELECT fact FROM why('retry');

-- A chunk: given back, with a worker that is gone, that does nothing, that is
-- at it.  In one transaction, or the supervisor would see it too.
CREATE PROCEDURE give_to(label text, pid int, started timestamptz, progress timestamptz) LANGUAGE sql AS
$$ UPDATE redrive.chunks SET state = 'running', lease_token = 1, worker_pid = pid, worker_started_at = started, progress_at = progress WHERE batch_id = scratch.batch(label) AND state <> 'done' $$;
SELECT * FROM why('in part') WHERE fact = 'orphaned items';
BEGIN;
CALL give_to('in part', 1, now(), now());
SELECT * FROM why('in part') WHERE fact = 'worker gone';
UPDATE redrive.chunks SET state = 'orphaned', lease_token = NULL, worker_pid = NULL, rescue_count = 2 WHERE state = 'running';
SELECT * FROM why('in part') WHERE fact = 'orphaned items';
ROLLBACK;
SELECT backend_start FROM pg_stat_activity WHERE pid = pg_backend_pid() \gset
BEGIN;
CALL give_to('in part', pg_backend_pid(), :'backend_start', now());
SELECT * FROM why('in part');
UPDATE redrive.chunks SET progress_at = now() - interval '10 min' WHERE state = 'running';
SELECT * FROM why('in part') WHERE fact <> 'waiting for a retry';
-- It was cancelled meanwhile.
SELECT redrive.cancel_batch(batch('in part'));
SELECT * FROM why('in part') WHERE fact = 'cancelled';
ROLLBACK;
-- Inside an item: seen from there.
SELECT redrive.submit('h', ARRAY['["good"]', '["ask"]']::jsonb[], label => 'inside') > 0 AS submitted;
CALL redrive.work();
SELECT fact, plain(detail), plain(remedy) FROM asked;
TRUNCATE asked;
SELECT redrive.alter_handler('h', item_timeout => '1 min');
SELECT redrive.submit('h', ARRAY['["ask"]']::jsonb[], label => 'inside again') > 0 AS submitted;
CALL redrive.work();
SELECT plain(remedy) FROM asked;
-- All done, but not folded: what a crash may leave.
BEGIN;
UPDATE redrive.batches SET state = 'running', finished_at = NULL, succeeded = 0 WHERE label = 'inside';
UPDATE redrive.chunks SET folded = false WHERE batch_id = batch('inside');
SELECT * FROM why('inside');
ROLLBACK;

-- Callbacks that are still to be made.
SELECT redrive.create_handler('calls', 'take', on_unlock => 'bad_callback', on_finish => 'bad_end');
SELECT redrive.submit('calls', ARRAY['["good"]']::jsonb[], ARRAY['c'], label => 'calls') > 0 AS submitted;
SELECT redrive.submit('calls', ARRAY['["good"]']::jsonb[], label => 'not called', run_at => now() + interval '1 day') > 0 AS submitted;
CALL redrive.work();
SELECT * FROM why('calls');
BEGIN;
UPDATE redrive.callbacks SET crash_count = 2, next_attempt_at = NULL, message = 'the callback crashed the server' WHERE kind = 'on_unlock';
SELECT * FROM why('calls') WHERE detail ~ 'on_unlock';
ROLLBACK;

-- The handler cannot run.
CREATE ROLE regress_why_a LOGIN;
CREATE ROLE regress_why_b LOGIN;
CREATE ROLE regress_why_member LOGIN IN ROLE regress_why_a;
CREATE ROLE regress_why_monitor LOGIN;
SELECT redrive.grant_user('regress_why_a'), redrive.grant_user('regress_why_b'), redrive.grant_user('regress_why_member'), redrive.grant_monitor('regress_why_monitor') \g /dev/null
CREATE SCHEMA regress_why;
GRANT USAGE, CREATE ON SCHEMA regress_why TO regress_why_a;
SET SESSION AUTHORIZATION regress_why_a;
CREATE FUNCTION regress_why.take(payload jsonb) RETURNS void LANGUAGE sql AS '';
CREATE FUNCTION regress_why.unlocked(key text) RETURNS void LANGUAGE sql AS '';
SELECT redrive.create_handler('a', 'regress_why.take', on_unlock => 'regress_why.unlocked');
SELECT redrive.submit('a', ARRAY['1']::jsonb[], ARRAY['a'], label => 'of a') > 0 AS submitted;
SELECT fact, detail, remedy FROM why('of a');
RESET SESSION AUTHORIZATION;
BEGIN;
DROP FUNCTION regress_why.take;
DROP FUNCTION regress_why.unlocked;
SELECT * FROM why('of a') WHERE fact !~ 'redrive';
ROLLBACK;
BEGIN;
REVOKE EXECUTE ON FUNCTION regress_why.take FROM PUBLIC, regress_why_a;
ALTER FUNCTION regress_why.take OWNER TO CURRENT_USER;
SELECT * FROM why('of a') WHERE fact !~ 'redrive';
ROLLBACK;
BEGIN;
REVOKE USAGE ON SCHEMA regress_why FROM regress_why_a;
SELECT * FROM why('of a') WHERE fact !~ 'redrive';
ROLLBACK;
BEGIN;
REVOKE CONNECT ON DATABASE contrib_regression FROM PUBLIC;
SELECT * FROM why('of a') WHERE fact !~ 'redrive';
ROLLBACK;
BEGIN;
UPDATE redrive.handlers SET owner = 1::oid::regrole WHERE name = 'a';
SELECT * FROM why('of a') WHERE fact !~ 'redrive';
ROLLBACK;
-- A worker that finds it so pauses the batch: both are said.
DROP FUNCTION regress_why.take;
SET SESSION AUTHORIZATION regress_why_a;
CALL redrive.work();
SELECT * FROM why('of a');

-- Who may ask: members of the owner, and monitors, who see no messages.
SET SESSION AUTHORIZATION regress_why_member;
SELECT fact, detail FROM why('of a');
SET SESSION AUTHORIZATION regress_why_b;
SELECT fails(format('SELECT * FROM redrive.why(%s)', batch('of a')));
SELECT fails('SELECT * FROM redrive.why(-1)');
SELECT fails('SELECT * FROM redrive.why(NULL)');
SET SESSION AUTHORIZATION regress_why_monitor;
SELECT fact, detail FROM why('of a');
SELECT fact, detail FROM why('defect');
SELECT fact, detail FROM why('calls');
SELECT fails('SELECT * FROM redrive.why(-1)');
SELECT fails('SELECT * FROM redrive._why(10, 1)');
RESET SESSION AUTHORIZATION;
\x off
\pset format aligned
\pset tuples_only off
SET client_min_messages = warning;
DELETE FROM redrive.callbacks;
SELECT redrive.cancel_batch(batch_id) FROM redrive.batch_progress WHERE state NOT IN ('finished', 'cancelled') ORDER BY batch_id \g /dev/null
SELECT redrive.drop_handler(name) FROM redrive.handlers ORDER BY name \g /dev/null
DROP SCHEMA regress_why CASCADE;
DROP OWNED BY regress_why_a, regress_why_b, regress_why_member, regress_why_monitor;
DROP ROLE regress_why_a, regress_why_b, regress_why_member, regress_why_monitor;
