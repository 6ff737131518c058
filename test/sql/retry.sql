-- Retry: when, how often, at what cost; and redrive, which begins anew.
\getenv here PG_ABS_SRCDIR
\set tools :here '/sql/tools.psql'
\i :tools

CREATE TABLE done (batch_id bigint, item_no bigint, key text, payload jsonb, attempt int);
CREATE TABLE works (from_attempt int);
INSERT INTO works VALUES (1000);
CREATE FUNCTION fail_for_a_while(item redrive.item) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    IF item.attempt < coalesce((item.payload ->> 'until')::int, (SELECT from_attempt FROM scratch.works)) THEN
        RAISE EXCEPTION 'attempt % of item %', item.attempt, item.item_no USING ERRCODE = coalesce(item.payload ->> 'sqlstate', 'P0001');
    END IF;
    INSERT INTO scratch.done VALUES (item.batch_id, item.item_no, item.key, item.payload, item.attempt);
END
$$;
-- All the failures of a batch, with the delay as a part of the one announced.
CREATE VIEW delays AS
SELECT p.label, f.item_no, f.state, f.reason, f.retry_count, f.attempts, f.next_attempt_at - f.last_failed_at AS delay
FROM redrive.failed_items AS f JOIN redrive.batch_progress AS p ON p.batch_id = f.batch_id;

-- delay * factor ^ retry_count, at most the cap, less up to a tenth: 10 s, 30 s,
-- 90 s, then 100 s.
SELECT redrive.create_handler('h', 'fail_for_a_while', max_retries => 5, retry_delay => '10 s', retry_factor => 3, retry_delay_max => '100 s');
SELECT redrive.submit('h', array_agg('{}'::jsonb), array_agg('k' || i), label => 'delays') > 0 AS submitted FROM generate_series(1, 200) AS i;
CREATE TABLE bounds AS SELECT r AS retry_count, make_interval(secs => least(10 * 3 ^ r, 100)) AS longest FROM generate_series(0, 5) AS r;
CREATE TABLE first_delays (item_no bigint, delay interval);
DO $$
BEGIN
    FOR i IN 0 .. 5 LOOP
        CALL redrive.work();
        IF i = 0 THEN
            INSERT INTO scratch.first_delays SELECT item_no, delay FROM scratch.delays;
        END IF;
        RAISE NOTICE '%', (
            SELECT format('retry %s: %s items, %s, reason %s, attempts %s, %s out of bounds, %s delays, %s keys locked', i, count(*), min(d.state), coalesce(min(d.reason)::text, 'none'), min(d.attempts),
                count(*) FILTER (WHERE d.retry_count <> i OR d.attempts <> i + 1 OR d.delay > b.longest OR d.delay < b.longest * 0.9),
                CASE WHEN count(DISTINCT d.delay) > 100 THEN 'many' ELSE count(DISTINCT d.delay)::text END, (SELECT count(*) FROM redrive.locks))
            FROM scratch.delays AS d JOIN scratch.bounds AS b ON b.retry_count = i);
        CALL scratch.make_due();
    END LOOP;
END
$$;
-- max_retries 5 means 6 attempts; the end unlocked the keys.
SELECT * FROM progress;
SELECT count(*) AS locks FROM redrive.locks;
SELECT * FROM broken;
-- Every attempt is in the log, with what it said.
SELECT attempt, run_no, count(*), count(*) FILTER (WHERE message <> format('attempt %s of item %s', attempt, item_no)) AS wrong FROM redrive.failure_attempts GROUP BY attempt, run_no ORDER BY attempt;
SELECT count(*) AS not_in_time FROM (SELECT failed_at, lag(failed_at) OVER (PARTITION BY item_no ORDER BY attempt) AS before FROM redrive.failure_attempts) AS a WHERE before > failed_at;
SELECT handler, error_class, sqlstate, items, waiting, failed, sample_message LIKE 'attempt 6 of item %' AS sample FROM redrive.failure_groups;
SELECT count(*) FROM done;

-- redrive: all of them again, with a fresh budget and the keys locked; the
-- jitter of an item's first retry is what it was.
SELECT redrive.redrive(batch('delays'));
SELECT * FROM progress;
SELECT count(*) AS locks FROM redrive.locks;
SELECT * FROM broken;
CALL redrive.work();
SELECT count(*) AS items, count(*) FILTER (WHERE n.delay = f.delay) AS same_delay, min(n.retry_count) AS retries, max(n.retry_count) AS retries, min(n.attempts) AS attempts
FROM delays AS n JOIN first_delays AS f USING (item_no);
UPDATE works SET from_attempt = 1;
CALL make_due();
CALL redrive.work();
SELECT * FROM progress;
SELECT count(*), count(DISTINCT item_no), min(attempt), max(attempt) FROM done;
SELECT attempt, run_no, count(*) FROM redrive.failure_attempts GROUP BY attempt, run_no ORDER BY attempt;
SELECT count(*) AS locks FROM redrive.locks;
SELECT count(*) AS failed_items FROM redrive.failed_items;
SELECT * FROM broken;

-- An item that recovers: what its handler is given stays the same.
DELETE FROM done;
SELECT redrive.submit('h', array_agg(jsonb_build_object('i', i, 'until', 1 + i % 4) ORDER BY i), array_agg('r' || i ORDER BY i), label => 'recover') > 0 AS submitted FROM generate_series(1, 1000) AS i;
DO $$ BEGIN FOR i IN 1 .. 4 LOOP CALL redrive.work(); CALL scratch.make_due(); END LOOP; END $$;
SELECT count(*), count(DISTINCT item_no), bool_and((payload -> 'i')::bigint = item_no AND key = 'r' || item_no AND attempt = 1 + item_no % 4) AS as_given FROM done;
SELECT * FROM progress WHERE label = 'recover';
SELECT attempts, retry_count, state, count(*) FROM redrive.failures WHERE batch_id = batch('recover') GROUP BY 1, 2, 3 ORDER BY 1;
SELECT attempt, count(*) FROM redrive.failure_attempts WHERE batch_id = batch('recover') GROUP BY attempt ORDER BY attempt;
SELECT * FROM broken;

-- Other policies: none, at once, always the same, a changed one.
UPDATE works SET from_attempt = 1000;
SELECT redrive.create_handler('none', 'fail_for_a_while', max_retries => 0);
SELECT redrive.create_handler('at once', 'fail_for_a_while', max_retries => 3, retry_delay => '0');
SELECT redrive.create_handler('fixed', 'fail_for_a_while', max_retries => 3, retry_delay => '10 s', retry_factor => 1);
SELECT redrive.create_handler('capped', 'fail_for_a_while', max_retries => 3, retry_delay => '10 s', retry_delay_max => '1 s');
SELECT redrive.create_handler('huge', 'fail_for_a_while', max_retries => 1000, retry_delay => '100 years', retry_factor => 100, retry_delay_max => '100 years');
SELECT count(redrive.submit(h, ARRAY['{}', '{}']::jsonb[], label => h)) AS submitted FROM unnest(ARRAY['none', 'at once', 'fixed', 'capped', 'huge']) AS h;
CALL redrive.work();
SELECT label, item_no, state, reason, retry_count, attempts FROM delays WHERE label IN ('none', 'at once') ORDER BY label, item_no;
SELECT label, bool_and(delay BETWEEN '9 s' AND '10 s') AS ten_seconds, bool_and(delay BETWEEN '0.9 s' AND '1 s') AS one_second, bool_and(delay BETWEEN '32000 days' AND '36600 days') AS long FROM delays WHERE label IN ('fixed', 'capped', 'huge') GROUP BY label ORDER BY label;
CALL make_due();
CALL redrive.work();
SELECT label, bool_and(delay BETWEEN '9 s' AND '10 s') AS ten_seconds, bool_and(delay BETWEEN '0.9 s' AND '1 s') AS one_second, bool_and(delay BETWEEN '32000 days' AND '36600 days') AS long FROM delays WHERE label IN ('fixed', 'capped', 'huge') GROUP BY label ORDER BY label;
SELECT redrive.alter_handler('fixed', max_retries => 2, retry_delay => '1 s');
SELECT redrive.alter_handler('capped', max_retries => 9, retry_delay_max => '2 h');
CALL make_due();
CALL redrive.work();
SELECT label, state, reason, retry_count, attempts, bool_and(delay BETWEEN '36 s' AND '40 s') AS forty_seconds FROM delays WHERE label IN ('fixed', 'capped') GROUP BY 1, 2, 3, 4, 5 ORDER BY label;
SELECT * FROM broken;
SELECT redrive.cancel_batch(batch('capped')), redrive.cancel_batch(batch('huge'));

-- retry_free does not cost; it is capped apart, at 20, and from then on costs.
SELECT redrive.create_handler('free', 'fail_for_a_while', max_retries => 2, retry_delay => '10 s', retry_factor => 1);
SELECT redrive.submit('free', ARRAY['{"sqlstate": "58000"}', '{"sqlstate": "58000", "until": 19}']::jsonb[], ARRAY['f1', 'f2'], label => 'free') > 0 AS submitted;
DO $$
BEGIN
    FOR i IN 1 .. 24 LOOP
        CALL redrive.work();
        IF i IN (1, 2, 10, 18, 20, 21, 22, 23, 24) THEN
            RAISE NOTICE '%', (
                SELECT format('attempt %s: %s', i, string_agg(format('item %s %s, attempts %s, retries %s, delay %s', f.item_no, f.state, f.attempts, f.retry_count,
                    CASE WHEN f.next_attempt_at - f.last_failed_at BETWEEN '0.45 s' AND '0.5 s' THEN 'half a second' WHEN f.next_attempt_at - f.last_failed_at BETWEEN '0.9 s' AND '1 s' THEN 'a second'
                         WHEN f.next_attempt_at - f.last_failed_at BETWEEN '54 s' AND '60 s' THEN 'a minute' WHEN f.next_attempt_at - f.last_failed_at BETWEEN '9 s' AND '10 s' THEN 'ten seconds' ELSE coalesce((f.next_attempt_at - f.last_failed_at)::text, 'none') END), '; ' ORDER BY f.item_no))
                FROM redrive.failures AS f WHERE f.batch_id = scratch.batch('free'));
        END IF;
        CALL scratch.make_due();
    END LOOP;
END
$$;
SELECT * FROM progress WHERE label = 'free';
SELECT item_no, state, reason, retry_count, attempts FROM redrive.failures WHERE batch_id = batch('free') ORDER BY item_no;
SELECT * FROM broken;

-- Transient errors are tried at once, in new intervals, up to three times.
SELECT redrive.submit('free', ARRAY['{"sqlstate": "40001"}', '{}']::jsonb[], label => 'transient') > 0 AS submitted;
CREATE SEQUENCE tries;
CREATE FUNCTION busy(payload jsonb) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    IF nextval('scratch.tries') < payload::int THEN
        RAISE EXCEPTION 'busy' USING ERRCODE = '40P01';
    END IF;
END
$$;
SELECT redrive.create_handler('busy', 'busy');
SELECT redrive.submit('busy', ARRAY['4']::jsonb[], label => 'busy') > 0 AS submitted;
CALL redrive.work();
SELECT * FROM progress WHERE label = 'busy';
SELECT count(*) AS failures FROM redrive.failures WHERE batch_id = batch('busy');
ALTER SEQUENCE tries RESTART;
SELECT redrive.submit('busy', ARRAY['5']::jsonb[], label => 'too busy') > 0 AS submitted;
CALL redrive.work();
SELECT * FROM progress WHERE label = 'too busy';
CALL make_due();
CALL redrive.work();
SELECT * FROM progress WHERE label = 'too busy';
SELECT * FROM broken;
SELECT redrive.cancel_batch(batch('transient'));

-- Without a retry_delay failures wait for the pass.
UPDATE works SET from_attempt = 3;
SELECT redrive.create_handler('pass', 'fail_for_a_while', max_retries => 3, retry_delay => NULL);
SELECT redrive.submit('pass', ARRAY['{}', '{"until": 1}', '{}']::jsonb[], ARRAY['p1', 'p2', 'p3'], label => 'pass') > 0 AS submitted;
CALL redrive.work();
SELECT * FROM progress WHERE label = 'pass';
SELECT item_no, state, retry_count, next_attempt_at, redrive.is_locked('pass', key) AS locked FROM redrive.failed_items WHERE batch_id = batch('pass') ORDER BY item_no;
CALL make_due();
CALL redrive.work();
SELECT * FROM progress WHERE label = 'pass';
SELECT pass, outcome, acted, more, detail FROM redrive.retry_failed();
SELECT * FROM progress WHERE label = 'pass';
SELECT * FROM broken;
CALL redrive.work();
SELECT * FROM progress WHERE label = 'pass';
SELECT pass, outcome, acted, more, detail FROM redrive.retry_failed();
CALL redrive.work();
SELECT * FROM progress WHERE label = 'pass';
SELECT item_no, attempt FROM done WHERE batch_id = batch('pass') ORDER BY item_no;
SELECT item_no, attempt, run_no FROM redrive.failure_attempts WHERE batch_id = batch('pass') ORDER BY item_no, attempt;
SELECT * FROM broken;

-- redrive by error class, fingerprint, items.
UPDATE works SET from_attempt = 1000;
SELECT redrive.submit('none', array_agg(jsonb_build_object('sqlstate', (ARRAY['22000', 'P0001', '23505'])[1 + i % 3]) ORDER BY i), array_agg('n' || i ORDER BY i), label => 'parts') > 0 AS submitted FROM generate_series(1, 30) AS i;
CALL redrive.work();
SELECT error_class, sqlstate, items, failed FROM redrive.failure_groups WHERE fingerprint IN (SELECT fingerprint FROM redrive.failed_items WHERE batch_id = batch('parts')) AND handler = 'none' ORDER BY sqlstate;
SELECT redrive.redrive(batch('parts'), error_class => 'other');
SELECT state, error_class, count(*), count(*) FILTER (WHERE redrive.is_locked('none', key)) AS locked FROM redrive.failed_items WHERE batch_id = batch('parts') GROUP BY 1, 2 ORDER BY 1, 2;
SELECT state, count(*), count(*) FILTER (WHERE redrive.is_locked('none', key)) AS locked FROM redrive.item_status WHERE batch_id = batch('parts') GROUP BY 1 ORDER BY 1;
CALL redrive.work();
SELECT fingerprint FROM redrive.failed_items WHERE batch_id = batch('parts') AND sqlstate = '23505' LIMIT 1 \gset
SELECT redrive.redrive(batch('parts'), fingerprint => :'fingerprint');
SELECT state, sqlstate, count(*), count(*) FILTER (WHERE redrive.is_locked('none', key)) AS locked FROM redrive.failed_items WHERE batch_id = batch('parts') GROUP BY 1, 2 ORDER BY 1, 2;
SELECT state, count(*), count(*) FILTER (WHERE redrive.is_locked('none', key)) AS locked FROM redrive.item_status WHERE batch_id = batch('parts') GROUP BY 1 ORDER BY 1;
CALL redrive.work();
SELECT redrive.redrive(batch('parts'), item_nos => ARRAY[1, 2, 2, NULL, 1000]);
SELECT item_no FROM redrive.item_status WHERE batch_id = batch('parts') AND state = 'running' ORDER BY item_no;
UPDATE works SET from_attempt = 1;
CALL redrive.work();
SELECT * FROM progress WHERE label = 'parts';
-- All conditions hold at once.
SELECT redrive.redrive(batch('parts'), :'fingerprint', 'data', ARRAY[3, 4, 5]);
SELECT item_no FROM redrive.item_status WHERE batch_id = batch('parts') AND state = 'running' ORDER BY item_no;
CALL redrive.work();
SELECT redrive.redrive(batch('parts'));
CALL redrive.work();
SELECT * FROM progress WHERE label = 'parts';
SELECT count(*), count(DISTINCT item_no) FROM done WHERE batch_id = batch('parts');
SELECT * FROM broken;

-- What cannot be redriven.
SELECT fails(format('SELECT redrive.redrive(%s)', batch('parts')));
SELECT fails('SELECT redrive.redrive(NULL)');
SELECT fails('SELECT redrive.redrive(-1)');
UPDATE works SET from_attempt = 1000;
SELECT redrive.submit('none', ARRAY['{}', '{}']::jsonb[], ARRAY['x', 'y'], label => 'refused') > 0 AS submitted;
CALL redrive.work();
SELECT fails(format('SELECT redrive.redrive(%s, fingerprint => ''none'')', batch('refused')));
SELECT fails(format('SELECT redrive.redrive(%s, error_class => ''none'')', batch('refused')));
SELECT fails(format('SELECT redrive.redrive(%s, item_nos => ''{}'')', batch('refused')));
-- The key of one of them is another batch's now: nothing is done.
SELECT redrive.submit('none', ARRAY['{}']::jsonb[], ARRAY['y'], label => 'has y') > 0 AS submitted;
SELECT fails(format('SELECT redrive.redrive(%s)', batch('refused')));
SELECT redrive.is_locked('none', 'x') AS x_locked;
SELECT * FROM progress WHERE label = 'refused';
SELECT redrive.redrive(batch('refused'), item_nos => ARRAY[1]);
SELECT redrive.is_locked('none', 'x') AS x_locked;
SELECT redrive.pause_batch(batch('refused'));
SELECT fails(format('SELECT redrive.redrive(%s)', batch('refused')));
SELECT redrive.cancel_batch(batch('refused'));
SELECT fails(format('SELECT redrive.redrive(%s)', batch('refused')));
SELECT fails(format('SELECT redrive.redrive(%s)', batch('has y')));
CREATE ROLE regress_retry_a LOGIN;
SELECT redrive.grant_user('regress_retry_a');
SET SESSION AUTHORIZATION regress_retry_a;
SELECT fails(format('SELECT redrive.redrive(%s)', batch('refused')));
RESET SESSION AUTHORIZATION;
DROP OWNED BY regress_retry_a;
DROP ROLE regress_retry_a;
SELECT redrive.cancel_batch(batch('has y'));
-- A batch that still retries: its failed items join the next run.
SELECT redrive.submit('h', ARRAY['{"sqlstate": "22000"}', '{}']::jsonb[], label => 'still retrying') > 0 AS submitted;
CALL redrive.work();
SELECT * FROM progress WHERE label = 'still retrying';
SELECT redrive.redrive(batch('still retrying'));
SELECT * FROM progress WHERE label = 'still retrying';
UPDATE works SET from_attempt = 1;
CALL make_due();
CALL redrive.work();
SELECT * FROM progress WHERE label = 'still retrying';
SELECT * FROM broken;

-- Many failures: run again in few steps, each once.
DELETE FROM done;
UPDATE works SET from_attempt = 2;
SELECT redrive.submit('at once', array_agg('{}'::jsonb), array_agg('many' || i), label => 'many') > 0 AS submitted FROM generate_series(1, 12000) AS i;
CALL redrive.work();
SELECT * FROM progress WHERE label = 'many';
SELECT count(*), count(DISTINCT item_no), min(attempt), max(attempt) FROM done;
SELECT count(*) AS locks FROM redrive.locks;
SELECT label, state FROM progress WHERE state NOT IN ('finished', 'cancelled');
SELECT * FROM broken;

-- A redrive that is cancelled before it runs: the failures are back, with their errors, and their keys unlocked.
UPDATE works SET from_attempt = 100;
SELECT redrive.submit('none', array_agg(jsonb_build_object('sqlstate', '22000')), array_agg('c' || i), label => 'called off') > 0 AS submitted FROM generate_series(1, 300) AS i;
CALL redrive.work();
SELECT redrive.redrive(batch('called off'), item_nos => ARRAY(SELECT generate_series(11, 300)));
SELECT state, count(*), count(*) FILTER (WHERE redrive.is_locked('none', key)) AS locked FROM redrive.item_status WHERE batch_id = batch('called off') GROUP BY 1 ORDER BY 1;
SELECT redrive.cancel_batch(batch('called off'));
SELECT state, reason, sqlstate, attempts, count(key) AS keys, count(*) FILTER (WHERE message = 'attempt 1 of item ' || item_no) AS messages FROM redrive.failed_items WHERE batch_id = batch('called off') GROUP BY 1, 2, 3, 4 ORDER BY 1;
SELECT attempt, count(*), count(DISTINCT item_no) FROM redrive.failure_attempts WHERE batch_id = batch('called off') GROUP BY 1;
SELECT state, count(*), count(*) FILTER (WHERE redrive.is_locked('none', key)) AS locked FROM redrive.item_status WHERE batch_id = batch('called off') GROUP BY 1 ORDER BY 1;
SELECT count(*) AS lists FROM redrive.retry_lists;
SELECT * FROM progress WHERE label = 'called off';
SELECT * FROM broken;
