-- Stale: each reason at the border of its time, and the passes, all with as_of.
\getenv here PG_ABS_SRCDIR
\set tools :here '/sql/tools.psql'
\i :tools

CREATE TABLE done (batch_id bigint, item_no bigint, attempt int);
CREATE FUNCTION take(item redrive.item) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    IF item.payload = '"fail"' THEN
        RAISE EXCEPTION 'told to';
    ELSIF item.payload = '"pause"' AND item.attempt = 1 THEN
        PERFORM redrive.pause_batch(item.batch_id);
    END IF;
    INSERT INTO scratch.done VALUES (item.batch_id, item.item_no, item.attempt);
END
$$;
SELECT redrive.create_handler('h', 'take', isolation => 'item');
SELECT redrive.create_handler('pass', 'take', retry_delay => NULL);

-- All that is known of a batch happened at one time, which is t.
\set t '''2030-06-01 12:00:00+00'''
CREATE PROCEDURE all_at(label text, t timestamptz) LANGUAGE plpgsql AS $$
BEGIN
    UPDATE redrive.batches AS b
    SET created_at = t, run_at = t, sealed_at = CASE WHEN sealed_at IS NOT NULL THEN t END, started_at = CASE WHEN started_at IS NOT NULL THEN t END,
        last_progress_at = t, attempted_at = CASE WHEN attempted_at IS NOT NULL THEN t END, finished_at = CASE WHEN finished_at IS NOT NULL THEN t END,
        next_retry_at = CASE WHEN next_retry_at IS NOT NULL THEN t END, oldest_failure_at = CASE WHEN oldest_failure_at IS NOT NULL THEN t END
    WHERE b.label = all_at.label;
    UPDATE redrive.chunks SET claimed_at = t, progress_at = t WHERE batch_id = scratch.batch(label);
    UPDATE redrive.failures SET first_failed_at = t, last_failed_at = t, next_attempt_at = CASE WHEN next_attempt_at IS NOT NULL THEN t END WHERE batch_id = scratch.batch(label);
END
$$;
-- Which reasons hold at t and so long after: just before, at, and just after the border.
CREATE FUNCTION around(label text, t timestamptz, border interval) RETURNS TABLE (at text, reason text, since interval, action text)
LANGUAGE sql AS $$
    SELECT x.at, s.reason, s.since - t, s.action
    FROM (VALUES (1, 'just before', '-1 us'::interval), (2, 'border', '0'), (3, 'just after', '1 us')) AS x (place, at, shift)
    LEFT JOIN LATERAL (SELECT * FROM redrive.stale_batches_at(t + border + x.shift) AS y WHERE y.batch_id = scratch.batch(label)) AS s ON true
    ORDER BY x.place, s.reason
$$;
CREATE FUNCTION do_pass(name text, as_of timestamptz) RETURNS TABLE (pass text, outcome text, acted bigint, more boolean, detail text)
LANGUAGE plpgsql AS $$ BEGIN RETURN QUERY EXECUTE format('SELECT * FROM redrive.%I($1)', name) USING as_of; END $$;

-- Nothing is stale when nothing is there.
SELECT * FROM redrive.stale_batches_at('infinity');
SELECT * FROM do_pass('rescue_stale', :t);
SELECT * FROM do_pass('retry_failed', :t);
SELECT * FROM redrive.stale_batches;

-- never_started: sealed, due, and not started for start_timeout = 1 hour.
SELECT redrive.submit('h', ARRAY['1']::jsonb[], label => 'never started') > 0 AS submitted;
CALL all_at('never started', :t);
SELECT * FROM around('never started', :t, '1 h');
UPDATE redrive.batches SET run_at = :t::timestamptz + interval '1 day' WHERE label = 'never started';
SELECT * FROM around('never started', :t, '1 h');
SELECT * FROM around('never started', :t, '25 h');
SELECT * FROM do_pass('rescue_stale', :t::timestamptz + interval '25 h');
SELECT * FROM progress;
-- The action says why it does not start.
SELECT redrive.pause_handler('h');
SELECT * FROM around('never started', :t, '25 h') WHERE at = 'border';
SELECT redrive.resume_handler('h');
SELECT redrive.alter_handler('h', start_timeout => '2 h');
SELECT * FROM around('never started', :t, '26 h');
SELECT redrive.alter_handler('h', start_timeout => '1 h');
UPDATE redrive.batches SET run_at = now(), serve_after = now() WHERE label = 'never started';
CALL redrive.work();
SELECT * FROM redrive.stale_batches_at('2100-01-01');
SELECT * FROM broken;

-- Whatever a user may ask for, the passes can add it up.
-- Seen red: without the limit of run_at, or of a setting, nothing is listed: timestamp out of range.
SELECT redrive.create_handler('far', 'take', stale_after => '100 years', start_timeout => '100 years', retry_window => '100 years');
SELECT redrive.submit('far', ARRAY['1']::jsonb[], run_at => date_trunc('day', now()) + interval '10000 years', label => 'far ahead') > 0 AS submitted;
SELECT redrive.open_batch('far', run_at => '4713-01-01 BC', label => 'long ago') > 0 AS opened;
SELECT p.label, s.reason, s.since - p.run_at AS since FROM redrive.stale_batches_at('infinity') AS s JOIN redrive.batch_progress AS p USING (batch_id) WHERE s.reason = 'never_started' ORDER BY s.batch_id;
SELECT fails($$SELECT redrive.submit('far', ARRAY['1']::jsonb[], run_at => now() + interval '10001 years')$$) AS answer LIMIT 1;
SELECT fails($$SELECT redrive.alter_handler('far', start_timeout => '178000000 years')$$) AS answer LIMIT 1;
SELECT * FROM do_pass('rescue_stale', now());
SELECT redrive.cancel_batch(batch(l)) FROM unnest(ARRAY['far ahead', 'long ago']) AS l;
SELECT redrive.drop_handler('far');

-- unsealed: open and not filled for an hour; the pass cancels it.
SELECT redrive.open_batch('h', label => 'unsealed') > 0 AS opened;
SELECT redrive.add_items(batch('unsealed'), ARRAY['1', '2']::jsonb[], ARRAY['u1', 'u2']);
CALL all_at('unsealed', :t);
SELECT * FROM around('unsealed', :t, '1 h');
SELECT * FROM do_pass('rescue_stale', :t::timestamptz + interval '1 h' - interval '1 us');
SELECT state FROM progress WHERE label = 'unsealed';
SELECT * FROM do_pass('rescue_stale', :t::timestamptz + interval '1 h');
SELECT * FROM progress WHERE label = 'unsealed';
SELECT redrive.is_locked('h', 'u1') AS locked;
SELECT * FROM redrive.stale_batches_at('2100-01-01');
SELECT * FROM broken;

-- no_progress, nobody works on it: claimed in part, 10 minutes ago.
SELECT redrive.submit('h', ARRAY['1', '"pause"', '3']::jsonb[], label => 'idle') > 0 AS submitted;
CALL redrive.work();
CALL all_at('idle', :t);
SELECT * FROM around('idle', :t, '10 min');
SELECT redrive.resume_batch(batch('idle'));
CALL all_at('idle', :t);
SELECT * FROM around('idle', :t, '10 min');
SELECT * FROM do_pass('rescue_stale', :t::timestamptz + interval '10 min');
CALL redrive.work();
SELECT * FROM progress WHERE label = 'idle';
SELECT * FROM broken;

-- orphaned: the worker of a chunk is gone, which is a fact and needs no time.
SELECT redrive.submit('h', ARRAY['1', '"pause"', '3', '4']::jsonb[], ARRAY['o1', 'o2', 'o3', 'o4'], label => 'orphaned') > 0 AS submitted;
CALL redrive.work();
SELECT redrive.resume_batch(batch('orphaned'));
CREATE PROCEDURE give_to(label text, pid int, started timestamptz) LANGUAGE sql AS
$$ UPDATE redrive.chunks SET state = 'running', lease_token = 1, worker_pid = pid, worker_started_at = started WHERE batch_id = scratch.batch(label) AND state = 'orphaned' $$;
-- In one transaction, or the supervisor would see it too.
BEGIN;
CALL give_to('orphaned', 1, now());
CALL all_at('orphaned', :t);
SELECT * FROM progress WHERE label = 'orphaned';
SELECT item_no, state FROM redrive.item_status WHERE batch_id = batch('orphaned') ORDER BY item_no;
SELECT * FROM broken;
SELECT * FROM around('orphaned', :t, '0');
SELECT * FROM do_pass('rescue_stale', :t);
COMMIT;
SELECT state, rescue_count, worker_pid, lease_token FROM redrive.chunks WHERE batch_id = batch('orphaned') ORDER BY chunk_id;
SELECT * FROM progress WHERE label = 'orphaned';
SELECT * FROM broken;
CALL redrive.work();
SELECT * FROM progress WHERE label = 'orphaned';
-- It cost no attempt.
SELECT item_no, attempt FROM done WHERE batch_id = batch('orphaned') ORDER BY item_no;
SELECT * FROM broken;
-- A process of that number that started at another time is another one.
SELECT redrive.submit('h', ARRAY['"pause"', '2']::jsonb[], label => 'same pid') > 0 AS submitted;
CALL redrive.work();
SELECT redrive.resume_batch(batch('same pid'));
BEGIN;
CALL give_to('same pid', pg_backend_pid(), now() - interval '1 day');
SELECT reason FROM redrive.stale_batches WHERE batch_id = batch('same pid');
SELECT * FROM do_pass('rescue_stale', now());
COMMIT;
-- Ten times lost: it is the chunk, not the worker.
DO $$
BEGIN
    FOR i IN 2 .. 10 LOOP
        CALL scratch.give_to('same pid', 1, now());
        PERFORM redrive.rescue_stale();
    END LOOP;
END
$$;
SELECT label, state, regexp_replace(pause_reason, '\d+', 'N') AS pause_reason FROM redrive.batch_progress WHERE label = 'same pid';
SELECT redrive.resume_batch(batch('same pid'));
CALL redrive.work();
SELECT * FROM progress WHERE label = 'same pid';
-- Cancelled while the worker was lost: the rest is cancelled, the batch ends.
SELECT redrive.submit('h', ARRAY['"pause"', '2']::jsonb[], ARRAY['x1', 'x2'], label => 'lost and cancelled') > 0 AS submitted;
CALL redrive.work();
SELECT redrive.resume_batch(batch('lost and cancelled'));
BEGIN;
CALL give_to('lost and cancelled', 1, now());
SELECT redrive.cancel_batch(batch('lost and cancelled'));
SELECT label, state, running, cancelled, finished_at FROM redrive.batch_progress WHERE label = 'lost and cancelled';
SELECT redrive.is_locked('h', 'x2') AS locked;
SELECT * FROM do_pass('rescue_stale', now());
COMMIT;
SELECT label, state, running, cancelled, finished_at IS NOT NULL AS finished FROM redrive.batch_progress WHERE label = 'lost and cancelled';
SELECT redrive.is_locked('h', 'x2') AS locked;
SELECT * FROM broken;

-- no_progress, the worker is there and in no item: 10 minutes.
SELECT redrive.submit('h', ARRAY['"pause"', '2']::jsonb[], label => 'stuck') > 0 AS submitted;
CALL redrive.work();
SELECT redrive.resume_batch(batch('stuck'));
SELECT backend_start FROM pg_stat_activity WHERE pid = pg_backend_pid() \gset
CALL give_to('stuck', pg_backend_pid(), :'backend_start');
CALL all_at('stuck', :t);
SELECT * FROM around('stuck', :t, '10 min');
SELECT * FROM do_pass('rescue_stale', :t::timestamptz + interval '10 min' - interval '1 us');
SELECT state FROM redrive.chunks WHERE batch_id = batch('stuck');
SELECT * FROM do_pass('rescue_stale', :t::timestamptz + interval '10 min');
SELECT state, rescue_count FROM redrive.chunks WHERE batch_id = batch('stuck');
CALL redrive.work();
SELECT * FROM progress WHERE label = 'stuck';
SELECT * FROM broken;

-- unfinished: all is done and it was not marked; a minute.
SELECT redrive.submit('h', ARRAY['1']::jsonb[], label => 'unfinished') > 0 AS submitted;
CALL redrive.work();
UPDATE redrive.batches SET state = 'running', finished_at = NULL, attempted_at = NULL WHERE label = 'unfinished';
CALL all_at('unfinished', :t);
SELECT * FROM around('unfinished', :t, '1 min');
SELECT * FROM do_pass('rescue_stale', :t::timestamptz + interval '1 min');
SELECT label, state, finished_at IS NOT NULL AS finished FROM redrive.batch_progress WHERE label = 'unfinished';
-- The same, with a chunk that was not added to the counters.
UPDATE redrive.chunks SET folded = false WHERE batch_id = batch('unfinished');
UPDATE redrive.batches SET state = 'running', finished_at = NULL, attempted_at = NULL, succeeded = 0 WHERE label = 'unfinished';
CALL all_at('unfinished', :t);
SELECT * FROM progress WHERE label = 'unfinished';
SELECT * FROM around('unfinished', :t, '1 min');
SELECT * FROM do_pass('rescue_stale', :t::timestamptz + interval '1 min');
SELECT * FROM progress WHERE label = 'unfinished';
SELECT * FROM broken;

-- failed_recently: the run ended within 24 hours and items are left with
-- retries: 3 of them.
SELECT redrive.submit('pass', ARRAY['"fail"', '2']::jsonb[], ARRAY['f1', 'f2'], label => 'failed') > 0 AS submitted;
CALL redrive.work();
CALL all_at('failed', :t);
SELECT * FROM around('failed', :t, '0');
SELECT * FROM around('failed', :t, '24 h');
SELECT redrive.alter_handler('pass', retry_window => '48 h');
SELECT * FROM around('failed', :t, '24 h');
SELECT redrive.alter_handler('pass', retry_window => '24 h');
-- What the pass starts is due at once, also when it is asked about the future.
SELECT * FROM do_pass('retry_failed', :t::timestamptz + interval '23 h');
SELECT label, state, run_no, waiting, next_retry_at <= clock_timestamp() AS due FROM redrive.batch_progress WHERE label = 'failed';
SELECT * FROM do_pass('retry_failed', now());
DO $$
BEGIN
    FOR i IN 1 .. 3 LOOP
        CALL redrive.work();
        RAISE NOTICE '%', (SELECT format('run %s: %s, retries %s, attempts %s, pass %s', b.run_no, f.state, f.retry_count, f.attempts, (SELECT coalesce(detail, 'nothing') FROM redrive.retry_failed()))
            FROM redrive.batch_progress AS b JOIN redrive.failed_items AS f USING (batch_id) WHERE b.label = 'failed');
    END LOOP;
END
$$;
SELECT * FROM progress WHERE label = 'failed';
SELECT item_no, state, reason, retry_count, attempts FROM redrive.failed_items WHERE batch_id = batch('failed');
SELECT redrive.is_locked('pass', 'f1') AS locked;
SELECT * FROM around('failed', :t, '24 h');
SELECT * FROM broken;

-- max_retries is asked when an item fails.  What waits has its retry, by the pass
-- or by its time, also when there were none any more for it.
-- Seen red: with a look at max_retries in the pass, "by pass" waits in vain.
SELECT redrive.create_handler('lowered', 'take', retry_delay => NULL);
SELECT redrive.submit('lowered', ARRAY['"fail"']::jsonb[], ARRAY['l1'], label => 'by pass') > 0 AS submitted;
CALL redrive.work();
SELECT redrive.alter_handler('lowered', retry_delay => '1 h');
SELECT redrive.submit('lowered', ARRAY['"fail"']::jsonb[], ARRAY['l2'], label => 'by time') > 0 AS submitted;
CALL redrive.work();
SELECT redrive.alter_handler('lowered', max_retries => 0);
SELECT fact, regexp_replace(detail, ' It ran last .*', '') AS detail FROM redrive.why(batch('by pass')) WHERE fact LIKE 'waiting%';
SELECT * FROM do_pass('retry_failed', now());
UPDATE redrive.failures SET next_attempt_at = now() WHERE batch_id = batch('by time');
UPDATE redrive.batches SET next_retry_at = now() WHERE label = 'by time';
CALL redrive.work();
SELECT p.label, p.state, f.state AS item, f.reason, f.attempts, redrive.is_locked('lowered', f.key) AS locked FROM redrive.batch_progress AS p JOIN redrive.failed_items AS f USING (batch_id) WHERE p.handler = 'lowered' ORDER BY 1;
SELECT * FROM broken;

-- overdue_retry: due a minute ago and not run.
SELECT redrive.submit('h', ARRAY['"fail"', '2']::jsonb[], label => 'overdue') > 0 AS submitted;
CALL redrive.work();
CALL all_at('overdue', :t);
SELECT * FROM around('overdue', :t, '1 min');
SELECT * FROM do_pass('retry_failed', :t::timestamptz + interval '1 min');
-- Not known to the batch: the pass finds it in the failures.
UPDATE redrive.batches SET next_retry_at = NULL WHERE label = 'overdue';
SELECT * FROM around('overdue', :t, '1 min');
SELECT * FROM do_pass('retry_failed', :t::timestamptz + interval '1 min');
SELECT next_retry_at = :t AS found FROM redrive.batches WHERE label = 'overdue';
SELECT * FROM do_pass('retry_failed', :t::timestamptz + interval '1 min');
SELECT redrive.cancel_batch(batch('overdue'));

-- expired: waited for 24 hours; failed, and the keys are unlocked.
SELECT redrive.submit('pass', ARRAY['"fail"', '"fail"', '3']::jsonb[], ARRAY['e1', 'e2', 'e3'], label => 'expired') > 0 AS submitted;
CALL redrive.work();
CALL all_at('expired', :t);
UPDATE redrive.failures SET first_failed_at = :t::timestamptz + interval '1 h' WHERE batch_id = batch('expired') AND item_no = 2;
SELECT * FROM around('expired', :t, '24 h') WHERE reason = 'expired';
SELECT * FROM do_pass('retry_failed', :t::timestamptz + interval '24 h' - interval '1 us');
UPDATE redrive.batches SET state = 'retrying', attempted_at = :t, next_retry_at = NULL, run_no = 1 WHERE label = 'expired';
UPDATE redrive.failures SET next_attempt_at = NULL WHERE batch_id = batch('expired');
CALL all_at('expired', :t);
UPDATE redrive.failures SET first_failed_at = :t::timestamptz + interval '1 h' WHERE batch_id = batch('expired') AND item_no = 2;
SELECT * FROM do_pass('retry_failed', :t::timestamptz + interval '24 h');
SELECT item_no, state, reason, redrive.is_locked('pass', key) AS locked FROM redrive.failed_items WHERE batch_id = batch('expired') ORDER BY item_no;
SELECT * FROM around('expired', :t, '25 h') WHERE reason = 'expired';
SELECT * FROM do_pass('retry_failed', :t::timestamptz + interval '25 h');
SELECT item_no, state, reason, redrive.is_locked('pass', key) AS locked FROM redrive.failed_items WHERE batch_id = batch('expired') ORDER BY item_no;
SELECT * FROM progress WHERE label = 'expired';
SELECT * FROM broken;
-- A paused batch too: nothing waits for ever.
SELECT redrive.submit('h', ARRAY['"fail"', '2']::jsonb[], ARRAY['p1', NULL], label => 'paused') > 0 AS submitted;
CALL redrive.work();
SELECT redrive.pause_batch(batch('paused'));
CALL all_at('paused', :t);
SELECT * FROM around('paused', :t, '24 h') WHERE at <> 'just before';
SELECT * FROM do_pass('retry_failed', :t::timestamptz + interval '25 h');
SELECT * FROM progress WHERE label = 'paused';
SELECT redrive.is_locked('h', 'p1') AS locked;
SELECT redrive.resume_batch(batch('paused'));
SELECT * FROM progress WHERE label = 'paused';
SELECT * FROM broken;
SELECT * FROM redrive.stale_batches_at('2100-01-01');

-- The history; the arguments of the passes.
SELECT pass, as_of - :t AS as_of, acted, more, detail, finished_at >= started_at AS in_order FROM redrive.pass_history WHERE as_of BETWEEN :t::timestamptz + interval '20 h' AND :t::timestamptz + interval '2 days' ORDER BY as_of, pass, acted;
SELECT fails('SELECT redrive.rescue_stale(NULL)');
SELECT fails('SELECT redrive.retry_failed(NULL)');
SELECT fails('SELECT redrive.purge(NULL)');
SELECT fails($$CALL redrive.run_pass('nothing')$$);
SELECT fails('CALL redrive.run_pass(NULL)');
DELETE FROM redrive.pass_log;
CALL redrive.run_pass('rescue_stale');
CALL redrive.run_pass('retry_failed', :t);
CALL redrive.run_pass('purge', now());
SELECT pass, as_of = :t AS given, acted, more, detail FROM redrive.pass_history ORDER BY pass;

-- purge: parts are used in turn, a sixth of the retention each; a part goes when
-- all in it ended before the retention.
DELETE FROM redrive.pass_log;
SELECT redrive.cancel_batch(batch_id) FROM redrive.batches WHERE state NOT IN ('finished', 'cancelled') \g /dev/null
UPDATE redrive.batches SET finished_at = :t;
INSERT INTO redrive.crashes SELECT batch_id, 1, 1, :t, :t FROM redrive.batches;
UPDATE redrive.rotation SET rotated_at = :t;
SELECT redrive.set_retention('60 days');
SELECT count(*) > 10 AS batches, bool_and(part = 0) AS first_part FROM redrive.batches;
SELECT * FROM do_pass('purge', :t::timestamptz + interval '10 days');
SELECT * FROM do_pass('purge', :t::timestamptz + interval '10 days 1 us');
SELECT redrive.submit('h', ARRAY['1']::jsonb[], label => 'second part') > 0 AS submitted;
SELECT part FROM redrive.batches WHERE label = 'second part';
CALL redrive.work();
SELECT * FROM do_pass('purge', :t::timestamptz + interval '60 days');
SELECT count(*) > 10 AS kept FROM redrive.batches WHERE part = 0;
-- A live batch keeps its part.
UPDATE redrive.batches SET state = 'paused', pause_reason = 'to keep it', finished_at = NULL WHERE label = 'idle';
UPDATE redrive.rotation SET rotated_at = :t::timestamptz + interval '60 days';
SELECT * FROM do_pass('purge', :t::timestamptz + interval '60 days 1 us');
UPDATE redrive.batches SET state = 'finished', pause_reason = NULL, finished_at = :t WHERE label = 'idle';
SELECT regexp_replace(detail, '\d+ batches', 'N batches') AS detail, acted > 10 AS acted, more FROM do_pass('purge', :t::timestamptz + interval '60 days 1 us');
SELECT (SELECT count(*) FROM redrive.batches WHERE part = 0) AS batches, (SELECT count(*) FROM redrive.item_blocks_0) AS item_blocks, (SELECT count(*) FROM redrive.failures_0) AS failures, (SELECT count(*) FROM redrive.failure_log_0) AS log, (SELECT count(*) FROM redrive.chunks WHERE part = 0) AS chunks, (SELECT count(*) FROM redrive.callbacks) AS callbacks, (SELECT count(*) FROM redrive.crashes) AS crashes;
SELECT label FROM progress;
SELECT * FROM do_pass('purge', :t::timestamptz + interval '60 days 1 us');
SELECT * FROM broken;
SELECT fails('SELECT redrive.set_retention(NULL)');
SELECT fails($$SELECT redrive.set_retention('0')$$);
SELECT fails($$SELECT redrive.set_retention('-1 day')$$);
SELECT retention FROM redrive.rotation;
-- The history is purged too.
UPDATE redrive.pass_log SET started_at = :t;
SELECT detail FROM do_pass('purge', :t::timestamptz + interval '60 days');
SELECT regexp_replace(detail, '^.*\d+ rows of the pass history', 'some rows of the pass history') AS detail FROM do_pass('purge', :t::timestamptz + interval '60 days 1 us');
UPDATE redrive.rotation SET retention = '30 days', part = 0, rotated_at = now();
