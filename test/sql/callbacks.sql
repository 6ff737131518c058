-- Callbacks: on_unlock when a key is unlocked, on_finish when a run ends; each
-- once, in the transaction of its effects.
\getenv here PG_ABS_SRCDIR
\set tools :here '/sql/tools.psql'
\i :tools

CREATE TABLE done (key text, top xid8 DEFAULT pg_current_xact_id());
CREATE TABLE unlocked (key text, locked boolean, role text, top xid8 DEFAULT pg_current_xact_id());
CREATE TABLE ended (batch_id bigint, run_no int, state redrive.batch_state, role text);
CREATE TABLE policy (unlock_fails boolean, finish_fails boolean, from_attempt int);
INSERT INTO policy VALUES (false, false, 1000);
CREATE FUNCTION take(item redrive.item) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    IF item.payload ? 'sqlstate' AND item.attempt < (SELECT from_attempt FROM scratch.policy) THEN
        RAISE EXCEPTION 'told to' USING ERRCODE = item.payload ->> 'sqlstate';
    END IF;
    INSERT INTO scratch.done VALUES (item.key);
END
$$;
CREATE FUNCTION cb_unlock(key text) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO scratch.unlocked VALUES (key, redrive.is_locked('h', key), current_user);
    IF (SELECT unlock_fails FROM scratch.policy) THEN
        RAISE EXCEPTION 'cannot tell of %', key;
    END IF;
END
$$;
CREATE FUNCTION cb_finish(batch_id bigint, run_no int) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO scratch.ended SELECT p.batch_id, cb_finish.run_no, p.state, current_user FROM redrive.batch_progress AS p WHERE p.batch_id = cb_finish.batch_id;
    IF (SELECT finish_fails FROM scratch.policy) THEN
        RAISE EXCEPTION 'cannot tell of the end';
    END IF;
END
$$;
CREATE VIEW callbacks AS SELECT kind, key, run_no, failures, next_attempt_at > clock_timestamp() AS later, message FROM redrive.callbacks ORDER BY callback_id;
SELECT redrive.create_handler('h', 'take', max_retries => 1, retry_delay => '1 h', on_unlock => 'cb_unlock', on_finish => 'cb_finish');

-- Each final outcome unlocks its key: succeeded, ignored, failed at once,
-- exhausted; an item without a key has none, a waiting one keeps it.
SELECT redrive.submit('h', ARRAY['{}', '{"sqlstate": "RD001"}', '{"sqlstate": "22000"}', '{"sqlstate": "P0001"}', '{}']::jsonb[], ARRAY['good', 'ignored', 'failed', 'waits', NULL], label => 'outcomes') > 0 AS submitted;
CALL redrive.work();
SELECT key, locked, role = current_user AS same_role FROM unlocked ORDER BY key;
SELECT * FROM ended;
SELECT count(*) AS same_transaction FROM done JOIN unlocked USING (key, top);
SELECT * FROM callbacks;
CALL make_due();
CALL redrive.work();
SELECT key, locked FROM unlocked ORDER BY key;
SELECT batch_id = batch('outcomes') AS batch, run_no, state, role = current_user AS same_role FROM ended;
SELECT * FROM callbacks;
SELECT * FROM broken;
-- Once per run.
UPDATE policy SET from_attempt = 1;
SELECT redrive.redrive(batch('outcomes'));
CALL redrive.work();
SELECT batch_id = batch('outcomes') AS batch, run_no, state FROM ended ORDER BY run_no;
SELECT key, count(*) FROM unlocked GROUP BY key ORDER BY key;
SELECT * FROM broken;

-- Many keys at once, some failing; and a batch of nothing.
DELETE FROM unlocked;
DELETE FROM ended;
UPDATE policy SET from_attempt = 1000;
SELECT redrive.submit('h', array_agg(CASE WHEN i % 10 = 0 THEN '{"sqlstate": "22000"}' ELSE '{}' END::jsonb), array_agg('m' || i), label => 'many') > 0 AS submitted FROM generate_series(1, 3000) AS i;
SELECT redrive.seal_batch(redrive.open_batch('h', label => 'nothing'));
CALL redrive.work();
SELECT count(*), count(DISTINCT key), bool_or(locked) AS still_locked FROM unlocked;
SELECT p.label, e.run_no, e.state FROM ended AS e JOIN redrive.batch_progress AS p USING (batch_id) ORDER BY p.label;
SELECT * FROM callbacks;

-- on_unlock fails: the items stay as they are, the key is unlocked, what it
-- wrote is gone, and it is called again until it works.
DELETE FROM unlocked;
DELETE FROM ended;
UPDATE policy SET unlock_fails = true;
SELECT redrive.submit('h', ARRAY['{}', '{"sqlstate": "22000"}']::jsonb[], ARRAY['u1', 'u2'], label => 'unlock fails') > 0 AS submitted;
CALL redrive.work();
SELECT * FROM progress WHERE label = 'unlock fails';
SELECT redrive.is_locked('h', 'u1') AS u1, redrive.is_locked('h', 'u2') AS u2;
SELECT * FROM unlocked;
SELECT count(*) AS ended FROM ended;
SELECT * FROM callbacks;
SELECT * FROM broken;
CALL redrive.work();
SELECT kind, key, failures FROM callbacks;
CALL make_due();
CALL redrive.work();
SELECT kind, key, failures FROM callbacks;
UPDATE policy SET unlock_fails = false;
CALL make_due();
CALL redrive.work();
SELECT key, locked FROM unlocked ORDER BY key;
SELECT * FROM callbacks;
-- A paused handler calls nothing.
UPDATE policy SET unlock_fails = true;
SELECT redrive.submit('h', ARRAY['{}']::jsonb[], ARRAY['u3'], label => 'handler paused') > 0 AS submitted;
CALL redrive.work();
SELECT redrive.pause_handler('h');
CALL make_due();
CALL redrive.work();
SELECT kind, key, failures FROM callbacks;
SELECT redrive.resume_handler('h');
UPDATE policy SET unlock_fails = false;
CALL redrive.work();
SELECT kind, key, failures FROM callbacks;
SELECT key FROM unlocked WHERE key = 'u3';

-- on_finish fails: called again, and the batch is finished all the same.
DELETE FROM ended;
UPDATE policy SET finish_fails = true;
SELECT redrive.submit('h', ARRAY['{}']::jsonb[], label => 'finish fails') > 0 AS submitted;
CALL redrive.work();
SELECT * FROM progress WHERE label = 'finish fails';
SELECT * FROM callbacks;
SELECT count(*) AS ended FROM ended;
UPDATE policy SET finish_fails = false;
CALL make_due();
CALL redrive.work();
SELECT run_no, state FROM ended;
SELECT * FROM callbacks;

-- Decided where no user code runs: cancel, and the pass that ends what expired.
DELETE FROM unlocked;
DELETE FROM ended;
SELECT redrive.submit('h', ARRAY['{}', '{}', '{}']::jsonb[], ARRAY['c1', NULL, 'c3'], label => 'cancelled') > 0 AS submitted;
SELECT redrive.cancel_batch(batch('cancelled'));
SELECT * FROM unlocked;
SELECT kind, key, failures FROM callbacks ORDER BY key;
CALL redrive.work();
SELECT key, locked FROM unlocked ORDER BY key;
SELECT count(*) AS ended FROM ended;
SELECT redrive.submit('h', ARRAY['{"sqlstate": "P0001"}']::jsonb[], ARRAY['e1'], label => 'expires') > 0 AS submitted;
CALL redrive.work();
SELECT pass, outcome, acted, more, detail FROM redrive.retry_failed(now() + '25 hours');
SELECT kind, key, failures FROM callbacks ORDER BY kind;
CALL redrive.work();
SELECT key, locked FROM unlocked WHERE key = 'e1';
SELECT run_no, state FROM ended;
SELECT * FROM callbacks;
SELECT * FROM broken;

-- The function is gone, or not wanted any more.
SELECT redrive.submit('h', ARRAY['{}']::jsonb[], ARRAY['g1'], label => 'gone') > 0 AS submitted;
ALTER FUNCTION cb_unlock(text) RENAME TO cb_renamed;
CALL redrive.work();
SELECT * FROM progress WHERE label = 'gone';
SELECT * FROM callbacks;
SELECT redrive.alter_handler('h', unset => ARRAY['on_unlock']);
CALL make_due();
CALL redrive.work();
SELECT * FROM callbacks;
SELECT count(*) FROM unlocked WHERE key = 'g1';
SELECT * FROM broken;

-- A deferred trigger fires while the callback can still fail.
CREATE TABLE strict (key text);
CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'refused at the end'; END $$;
CREATE CONSTRAINT TRIGGER refuse AFTER INSERT ON strict DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION refuse();
CREATE FUNCTION cb_strict(key text) RETURNS void LANGUAGE sql AS 'INSERT INTO scratch.strict VALUES ($1)';
SELECT redrive.create_handler('deferred', 'take', on_unlock => 'cb_strict');
SELECT redrive.submit('deferred', ARRAY['{}']::jsonb[], ARRAY['d1'], label => 'deferred') > 0 AS submitted;
CALL redrive.work();
SELECT * FROM progress WHERE label = 'deferred';
SELECT * FROM callbacks;
SELECT * FROM broken;

-- Many callbacks do not hold up all other work: a chunk has a turn in between.  Those of a turn take more than a second here.
--
-- Seen red: without MAX_CALLBACKS_US in redrive_execute_next.
CREATE TABLE turns (n int GENERATED ALWAYS AS IDENTITY, what text);
CREATE FUNCTION note_item(payload jsonb) RETURNS void LANGUAGE sql AS $$ INSERT INTO scratch.turns (what) VALUES ('item') $$;
CREATE FUNCTION note_unlock(key text) RETURNS void LANGUAGE sql AS $$ SELECT pg_sleep(0.025); INSERT INTO scratch.turns (what) VALUES ('callback') $$; -- slow handler
SELECT redrive.create_handler('turns', 'note_item', on_unlock => 'note_unlock');
SELECT redrive.submit('turns', array_agg('{}'::jsonb), array_agg('t' || i), label => 'unlocks') > 0 AS submitted FROM generate_series(1, 60) AS i;
SELECT redrive.cancel_batch(batch('unlocks'));
SELECT redrive.submit('turns', ARRAY['{}']::jsonb[], label => 'in between') > 0 AS submitted;
CALL redrive.work();
SELECT min(n) FILTER (WHERE what = 'item') AS item, count(*) FILTER (WHERE what = 'callback') AS callbacks FROM turns;
