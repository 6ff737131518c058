-- Set handlers: what a call gets, what an error in it means, and what a handler
-- says about its items.  The tables that they write are the truth; a sequence,
-- which no rollback undoes, counts the calls.
\getenv here PG_ABS_SRCDIR
\set tools :here '/sql/tools.psql'
\i :tools

CREATE TABLE done (batch_id bigint, item_no bigint, key text, payload jsonb, attempt int, place int, top xid8 DEFAULT pg_current_xact_id());
CREATE TABLE counted (n bigint);
INSERT INTO counted VALUES (0);
CREATE SEQUENCE calls;
-- Writes all items and counts them, then raises the error of a bad one, if any.
CREATE FUNCTION take(items redrive.item[]) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    v_bad text;
BEGIN
    PERFORM nextval('scratch.calls');
    INSERT INTO scratch.done (batch_id, item_no, key, payload, attempt, place)
    SELECT i.batch_id, i.item_no, i.key, i.payload, i.attempt, i.place FROM unnest(items) WITH ORDINALITY AS i (batch_id, item_no, key, payload, attempt, place);
    UPDATE scratch.counted SET n = n + cardinality(items);
    SELECT i.payload ->> 'raise' INTO v_bad FROM unnest(items) AS i WHERE i.payload ? 'raise' ORDER BY i.item_no DESC LIMIT 1;
    IF FOUND THEN
        RAISE EXCEPTION 'refused with %', v_bad USING ERRCODE = v_bad;
    END IF;
END
$$;
-- Good items 1 to n, but where p_bad says which error they raise.
CREATE FUNCTION submit(p_handler text, p_label text, n int, p_bad jsonb DEFAULT '{}') RETURNS bigint LANGUAGE sql AS $$
    SELECT redrive.submit(p_handler, array_agg(CASE WHEN p_bad ? i::text THEN jsonb_build_object('raise', p_bad -> i::text) ELSE to_jsonb(i) END ORDER BY i),
        array_agg(p_label || i ORDER BY i), label => p_label)
    FROM generate_series(1, n) AS i
$$;
-- What a batch did: items that are there other than once, or that are there and
-- have a failure, or neither; and how many calls it took.
CREATE VIEW told AS
SELECT b.label, count(*) FILTER (WHERE d.times = 1) AS there_once, count(*) FILTER (WHERE d.times > 1) AS there_twice,
    count(*) FILTER (WHERE (d.times IS NULL) = (f.item_no IS NULL)) AS wrong
FROM redrive.batches AS b
CROSS JOIN LATERAL generate_series(1, b.total) AS i
LEFT JOIN (SELECT batch_id, item_no, count(*) AS times FROM done GROUP BY batch_id, item_no) AS d ON d.batch_id = b.batch_id AND d.item_no = i
LEFT JOIN redrive.failures AS f ON f.batch_id = b.batch_id AND f.item_no = i
GROUP BY b.batch_id, b.label
ORDER BY b.batch_id;

-- What a function must be.
SELECT redrive.create_handler('set', 'take', 'set');
SELECT redrive.create_handler('hour', 'take', 'set', commit_interval => '1 h');
SELECT name, kind, function, signature FROM redrive.handlers ORDER BY name;
CREATE FUNCTION take(payload jsonb) RETURNS void LANGUAGE sql AS '';
CREATE FUNCTION row_only(payload jsonb) RETURNS void LANGUAGE sql AS '';
CREATE FUNCTION gives_int(items redrive.item[]) RETURNS int LANGUAGE sql AS 'SELECT 1';
CREATE FUNCTION gives_one(items redrive.item[]) RETURNS redrive.outcome LANGUAGE sql AS 'SELECT NULL::redrive.outcome';
CREATE FUNCTION gives_items(items redrive.item[]) RETURNS SETOF redrive.item LANGUAGE sql AS 'SELECT * FROM unnest(items)';
CREATE FUNCTION gives_table(items redrive.item[]) RETURNS TABLE (item_no bigint, outcome redrive.outcome_kind) LANGUAGE sql AS 'SELECT NULL::bigint, NULL::redrive.outcome_kind';
CREATE PROCEDURE is_procedure(items redrive.item[]) LANGUAGE sql AS '';
CREATE FUNCTION not_mine(items redrive.item[]) RETURNS void LANGUAGE sql AS '';
REVOKE EXECUTE ON FUNCTION not_mine FROM PUBLIC;
SELECT fails(format($$SELECT redrive.create_handler('h', %L, 'set')$$, f))
FROM unnest(ARRAY['row_only', 'none', 'gives_int', 'gives_one', 'gives_items', 'gives_table', 'is_procedure', 'take(jsonb)']) AS f;
SELECT fails($$SELECT redrive.create_handler('h', NULL, 'set')$$);
SELECT fails($$SELECT redrive.create_handler('h', 'gives_items')$$);
SELECT fails($$SELECT redrive.alter_handler('set', 'row_only')$$);
SELECT fails($$SELECT redrive.alter_handler('set', 'gives_int')$$);
SELECT fails($$SELECT redrive.alter_handler('set', kind => 'row')$$);
SELECT redrive.alter_handler('set', 'take', kind => 'set');
CREATE ROLE regress_sets LOGIN;
SELECT redrive.grant_user('regress_sets');
SET SESSION AUTHORIZATION regress_sets;
SELECT fails($$SELECT redrive.create_handler('h', 'not_mine', 'set')$$);
RESET SESSION AUTHORIZATION;

-- Each of 5000 items once, in order, and in few calls.
SELECT submit('set', 'good', 5000) > 0 AS submitted;
CALL redrive.work();
SELECT count(*), count(DISTINCT item_no), min(attempt), max(attempt), bool_and(payload = to_jsonb(item_no)) AS payloads, bool_and(key = 'good' || item_no) AS keys FROM done;
SELECT count(*) AS out_of_order FROM done AS a JOIN done AS b ON a.top = b.top AND a.item_no = b.item_no - 1 AND a.place <> b.place - 1 AND b.place > 1;
SELECT last_value BETWEEN 5 AND 100 AS few_calls FROM calls;
SELECT n AS counted FROM counted;
SELECT * FROM progress;
SELECT count(*) AS locks FROM redrive.locks;
SELECT * FROM broken;

-- One bad item of 10 000: about log2 of the length of its call more.
ALTER SEQUENCE calls RESTART;
SELECT submit('hour', 'one bad', 10000, '{"7531": "22000"}') > 0 AS submitted;
CALL redrive.work();
SELECT * FROM told WHERE label = 'one bad';
SELECT item_no, state, reason, error_class, sqlstate, message FROM redrive.failed_items WHERE batch_id = batch('one bad');
SELECT last_value < 100 AS few_calls FROM calls;
-- 50 of 5000, spread at random: 50 * log2(100) is 332.
ALTER SEQUENCE calls RESTART;
SELECT submit('hour', 'one in hundred', 5000, (SELECT jsonb_object_agg(i * 100 - abs(hashint4(i)) % 100, '22000') FROM generate_series(1, 50) AS i)) > 0 AS submitted;
CALL redrive.work();
SELECT * FROM told WHERE label = 'one in hundred';
SELECT last_value BETWEEN 100 AND 600 AS few_calls FROM calls;
-- All bad: hardly more calls than items.
SELECT redrive.create_handler('bad', 'take', 'set');
ALTER SEQUENCE calls RESTART;
SELECT submit('bad', 'all bad', 500, (SELECT jsonb_object_agg(i, '22000') FROM generate_series(1, 500) AS i)) > 0 AS submitted;
CALL redrive.work();
SELECT * FROM told WHERE label = 'all bad';
SELECT last_value BETWEEN 500 AND 600 AS few_calls FROM calls;
SELECT n = (SELECT count(*) FROM done) AS counted_what_is_there FROM counted;
SELECT * FROM progress WHERE label ~ 'bad|hundred';
SELECT * FROM broken;

-- Mixed causes: each bad item has its own error, and what follows from it.
SELECT submit('set', 'mixed', 1000, '{"1": "22000", "2": "RD001", "300": "RD002", "301": "23503", "302": "22000", "999": "53100", "1000": "ZZZZZ"}') > 0 AS submitted;
CALL redrive.work();
SELECT * FROM told WHERE label = 'mixed';
SELECT item_no, state, reason, error_class, sqlstate, message, retry_count, attempts FROM redrive.failed_items WHERE batch_id = batch('mixed') ORDER BY item_no;
SELECT count(*) AS locks, count(*) FILTER (WHERE key IN ('mixed300', 'mixed301', 'mixed999', 'mixed1000')) AS of_them_waiting FROM redrive.locks;
SELECT * FROM progress WHERE label = 'mixed';
SELECT * FROM broken;
-- Retries are given as an array too, with their attempt, until they are used up.
ALTER SEQUENCE calls RESTART;
CALL make_due();
CALL redrive.work();
SELECT item_no, state, attempts FROM redrive.failed_items WHERE batch_id = batch('mixed') AND state = 'waiting' ORDER BY item_no;
CREATE FUNCTION take_all(items redrive.item[]) RETURNS void LANGUAGE sql AS $$
    SELECT nextval('scratch.calls');
    INSERT INTO scratch.done SELECT i.batch_id, i.item_no, i.key, i.payload, i.attempt, cardinality(items) FROM unnest(items) AS i
$$;
SELECT redrive.alter_handler('set', 'take_all');
ALTER SEQUENCE calls RESTART;
CALL make_due();
CALL redrive.work();
SELECT item_no, attempt FROM done WHERE batch_id = batch('mixed') AND attempt > 1 ORDER BY item_no;
SELECT * FROM told WHERE label = 'mixed';
SELECT redrive.redrive(batch('mixed'), item_nos => ARRAY[1, 302]) AS run;
CALL redrive.work();
SELECT * FROM told WHERE label = 'mixed';
SELECT * FROM progress WHERE label = 'mixed';
SELECT count(*) AS locks FROM redrive.locks;
SELECT * FROM broken;
SELECT redrive.alter_handler('set', 'take');

-- Errors that come at the end only: deferred constraints belong to one item.
CREATE TABLE parent (id int PRIMARY KEY);
CREATE TABLE child (id int, parent int CONSTRAINT child_parent REFERENCES parent DEFERRABLE INITIALLY DEFERRED);
CREATE FUNCTION link(items redrive.item[]) RETURNS void LANGUAGE sql AS $$
    INSERT INTO scratch.child SELECT i.payload::int, i.payload::int FROM unnest(items) AS i;
    INSERT INTO scratch.parent SELECT i.payload::int FROM unnest(items) AS i WHERE i.payload::int % 100 <> 5
$$;
SELECT redrive.create_handler('links', 'link', 'set', retry_delay => '1 h');
SELECT submit('links', 'links', 500) > 0 AS submitted;
CALL redrive.work();
SELECT * FROM progress WHERE label = 'links';
SELECT count(*), count(DISTINCT id), count(*) FILTER (WHERE id % 100 = 5) AS bad FROM child;
SELECT item_no, error_class, sqlstate, constraint_name FROM redrive.failed_items WHERE batch_id = batch('links') ORDER BY item_no;
SELECT * FROM broken;
-- An error of the commit itself.
CREATE FUNCTION at_commit(items redrive.item[]) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    PERFORM nextval('scratch.calls');
    INSERT INTO scratch.done SELECT i.batch_id, i.item_no, i.key, i.payload, i.attempt FROM unnest(items) AS i;
    IF EXISTS (SELECT FROM unnest(items) AS i WHERE i.payload ? 'raise') THEN
        CREATE TEMP TABLE emptied (id int PRIMARY KEY) ON COMMIT DELETE ROWS;
        CREATE TEMP TABLE kept (id int REFERENCES emptied);
    END IF;
END
$$;
SELECT redrive.create_handler('at commit', 'at_commit', 'set', commit_interval => '1 h');
INSERT INTO redrive.classification_rules (handler, sqlstate_pattern, error_class, action) VALUES ('at commit', '0A000', 'at_commit', 'fail');
ALTER SEQUENCE calls RESTART;
SELECT submit('at commit', 'at commit', 1000, '{"1": "", "500": "", "1000": ""}') > 0 AS submitted;
CALL redrive.work();
SELECT * FROM told WHERE label = 'at commit';
SELECT item_no, error_class FROM redrive.failed_items WHERE batch_id = batch('at commit') ORDER BY item_no;
SELECT last_value < 200 AS few_calls FROM calls;
SELECT * FROM progress WHERE label = 'at commit';
SELECT * FROM broken;

-- Outcomes: what the payload says, and an error for those that shall raise one.
-- What the function wrote for the items stays, whatever it returns.
CREATE FUNCTION say(items redrive.item[]) RETURNS SETOF redrive.outcome LANGUAGE plpgsql AS $$
BEGIN
    PERFORM scratch.take(items);
    RETURN QUERY
    SELECT i.item_no, (i.payload ->> 'outcome')::redrive.outcome_kind, i.payload ->> 'message', i.payload ->> 'code', (i.payload ->> 'delay')::interval
    FROM unnest(items) AS i
    WHERE jsonb_typeof(i.payload) = 'object' AND NOT i.payload ? 'silent';
END
$$;
SELECT redrive.create_handler('says', 'say', 'set', max_retries => 1, retry_delay => '1 h', retry_factor => 1);
INSERT INTO redrive.classification_rules (handler, message_pattern, error_class, action) VALUES ('says', '^no money', 'poor', 'pause');
SELECT redrive.submit('says', ARRAY['1', '{"outcome": "ok"}', '{"outcome": "ok", "message": "not shown", "code": "22000"}',
        '{"outcome": "ignored"}', '{"outcome": "ignored", "message": "not wanted", "code": "E-17"}',
        '{"outcome": "failed"}', '{"outcome": "failed", "message": "bad date", "code": "22007"}', '{"outcome": "failed", "message": "no money: 5", "code": ""}',
        '{"outcome": "retry"}', '{"outcome": "retry", "message": "in a while", "code": "RD002", "delay": "10 days"}',
        '{"outcome": "snoozed"}', '{"outcome": "snoozed", "message": "not yet", "code": "busy", "delay": "5 days"}',
        '{"raise": "22000"}', '{"silent": true}', '{"raise": "RD001"}']::jsonb[],
    array(SELECT 's' || i FROM generate_series(1, 15) AS i), label => 'says') > 0 AS submitted;
CALL redrive.work();
SELECT item_no, state, reason, error_class, sqlstate, message, retry_count, attempts FROM redrive.failed_items WHERE batch_id = batch('says') ORDER BY item_no;
SELECT item_no, date_trunc('hour', next_attempt_at - last_failed_at + interval '10 min') AS delay FROM redrive.failed_items WHERE batch_id = batch('says') AND state = 'waiting' ORDER BY item_no;
SELECT item_no FROM done WHERE batch_id = batch('says') ORDER BY item_no;
SELECT key FROM redrive.locks ORDER BY key;
SELECT * FROM progress WHERE label = 'says';
SELECT count(*) AS hits FROM redrive.classification_rules WHERE error_class = 'poor' AND hits > 0;
SELECT * FROM broken;
-- Once more: a retry costs, and this was the last; a snooze does not.
CALL make_due();
CALL redrive.work();
SELECT item_no, state, reason, retry_count, attempts FROM redrive.failed_items WHERE batch_id = batch('says') AND item_no IN (9, 10, 11, 12) ORDER BY item_no;
-- But not for ever: after 20 times it costs like a retry.
DO $$
BEGIN
    FOR i IN 1 .. 18 LOOP
        CALL scratch.make_due();
        COMMIT;
        CALL redrive.work();
    END LOOP;
END
$$;
SELECT item_no, state, reason, retry_count, attempts FROM redrive.failed_items WHERE batch_id = batch('says') AND item_no IN (11, 12) ORDER BY item_no;
CALL make_due();
CALL redrive.work();
CALL make_due();
CALL redrive.work();
SELECT item_no, state, reason, error_class, retry_count, attempts FROM redrive.failed_items WHERE batch_id = batch('says') AND item_no IN (11, 12) ORDER BY item_no;
SELECT * FROM progress WHERE label = 'says';
SELECT * FROM broken;
-- The same cause is one group, returned or raised; a code of the application is
-- part of it.
SELECT redrive.submit('says', ARRAY['{"outcome": "failed", "message": "refused with 22000", "code": "22000"}', '{"raise": "22000"}',
    '{"outcome": "failed", "message": "refused with 1", "code": "A"}', '{"outcome": "failed", "message": "refused with 2", "code": "A"}',
    '{"outcome": "failed", "message": "refused with 2", "code": "B"}']::jsonb[], label => 'groups') > 0 AS submitted;
CALL redrive.work();
SELECT array_agg(item_no ORDER BY item_no) AS items, min(sqlstate) AS code, min(error_class) AS class FROM redrive.failed_items WHERE batch_id = batch('groups') GROUP BY fingerprint ORDER BY 1;
-- 1000 outcomes cost no further call.
ALTER SEQUENCE calls RESTART;
SELECT redrive.submit('says', array_agg('{"outcome": "failed", "message": "no", "code": "X"}'::jsonb), label => 'all fail') > 0 AS submitted FROM generate_series(1, 1000) AS i;
CALL redrive.work();
SELECT last_value < 50 AS few_calls FROM calls;
SELECT * FROM progress WHERE label = 'all fail';
SELECT * FROM broken;

-- What a handler must not say: nothing of the call is done, no item is blamed, and
-- the batch is paused.
CREATE TABLE answer (item_no bigint, outcome redrive.outcome_kind, delay interval);
CREATE FUNCTION answer(items redrive.item[]) RETURNS SETOF redrive.outcome LANGUAGE sql AS $$
    INSERT INTO scratch.done SELECT i.batch_id, i.item_no, i.key, i.payload, i.attempt FROM unnest(items) AS i;
    SELECT item_no, outcome, NULL, NULL, delay FROM scratch.answer
$$;
SELECT redrive.create_handler('answers', 'answer', 'set');
-- that calls get longer
SELECT submit('answers', 'good answers', 100) > 0 AS submitted;
CALL redrive.work();
SELECT submit('answers', 'answers', 40) > 0 AS submitted;
CREATE PROCEDURE try_answer(VARIADIC p_answers redrive.outcome[]) LANGUAGE plpgsql AS $$
BEGIN
    PERFORM redrive.resume_batch(batch_id) FROM redrive.batches WHERE label = 'answers' AND state = 'paused';
    DELETE FROM answer;
    INSERT INTO answer SELECT item_no, outcome, delay FROM unnest(p_answers);
    COMMIT;
    CALL redrive.work();
    RAISE NOTICE '%', (SELECT regexp_replace(pause_reason, '\d+ items of the call, .*', 'items of the call') FROM redrive.batches WHERE label = 'answers');
END
$$;
CALL try_answer((0, 'ok', NULL, NULL, NULL));
CALL try_answer((41, 'failed', NULL, NULL, NULL));
CALL try_answer((NULL, 'ok', NULL, NULL, NULL));
CALL try_answer((1, NULL, NULL, NULL, NULL));
CALL try_answer(NULL);
CALL try_answer((1, 'ok', NULL, NULL, NULL), (1, 'ok', NULL, NULL, NULL));
CALL try_answer((1, 'failed', NULL, NULL, NULL), (1, 'ignored', NULL, NULL, NULL));
CALL try_answer((1, 'retry', NULL, NULL, '-1 s'));
CALL try_answer((1, 'snoozed', NULL, NULL, '101 years'));
SELECT count(*) AS done FROM done WHERE batch_id = batch('answers');
SELECT count(*) AS failures FROM redrive.failures WHERE batch_id = batch('answers');
SELECT label, state, succeeded, failed, waiting, running + pending AS left FROM progress WHERE label = 'answers';
SELECT * FROM broken;
SELECT fact, detail FROM redrive.why(batch('answers')) WHERE fact = 'paused';
-- When it is mended, the batch goes on.
DELETE FROM answer;
SELECT redrive.resume_batch(batch('answers'));
CALL redrive.work();
SELECT * FROM told WHERE label ~ 'answers';
SELECT * FROM progress WHERE label ~ 'answers';
SELECT * FROM broken;
-- Rows of another type, as only a language like C can return them, one by one.
CREATE FUNCTION unnests(items redrive.item[]) RETURNS SETOF redrive.outcome LANGUAGE internal AS 'array_unnest';
SELECT redrive.create_handler('unnests', 'unnests', 'set');
SELECT submit('unnests', 'unnests', 40) > 0 AS submitted;
CALL redrive.work();
SELECT state, pause_reason FROM redrive.batches WHERE label = 'unnests';
SELECT redrive.cancel_batch(batch('unnests'));
-- The same error as that of a wrong answer, raised by the handler: only an error.
SELECT submit('says', 'RD005', 40, '{"17": "RD005"}') > 0 AS submitted;
CALL redrive.work();
SELECT item_no, state, sqlstate FROM redrive.failed_items WHERE batch_id = batch('RD005');
SELECT redrive.cancel_batch(batch('RD005'));

-- A handler that catches the errors itself has a subtransaction for each item: still
-- no transaction has so many (64) that snapshots get slow.
CREATE TABLE seen (item int, top xid8 NOT NULL DEFAULT pg_current_xact_id());
CREATE FUNCTION careful(items redrive.item[]) RETURNS SETOF redrive.outcome LANGUAGE plpgsql AS $$
DECLARE
    i redrive.item;
BEGIN
    FOREACH i IN ARRAY items LOOP
        BEGIN
            INSERT INTO scratch.seen VALUES (i.payload::int);
            IF i.item_no % 10 = 0 THEN
                RAISE EXCEPTION 'a tenth';
            END IF;
        EXCEPTION WHEN OTHERS THEN
            RETURN NEXT (i.item_no, 'failed', SQLERRM, SQLSTATE, NULL)::redrive.outcome;
        END;
    END LOOP;
END
$$;
SELECT redrive.create_handler('careful', 'careful', 'set');
SELECT submit('careful', 'careful', 1000) > 0 AS submitted;
CALL redrive.work();
SELECT count(*), count(DISTINCT item) FROM seen;
SELECT max(n) <= 60 AS few_enough, count(*) < 60 AS few_transactions FROM (SELECT count(DISTINCT xmin::text) AS n FROM seen GROUP BY top) AS t;
SELECT * FROM progress WHERE label = 'careful';
SELECT * FROM broken;

-- STRICT changes nothing, keys and payloads may be null.
CREATE FUNCTION strict_take(items redrive.item[]) RETURNS void STRICT LANGUAGE sql AS $$
    INSERT INTO scratch.done SELECT i.batch_id, i.item_no, i.key, i.payload, i.attempt FROM unnest(items) AS i
$$;
SELECT redrive.create_handler('strict', 'strict_take', 'set');
SELECT redrive.submit('strict', ARRAY['null', '{}', '[1, "a"]', jsonb_build_object('long', repeat('x', 100000))]::jsonb[], ARRAY[NULL, '', 'c', NULL], label => 'strict') > 0 AS submitted;
CALL redrive.work();
SELECT item_no, key, left(payload::text, 20) AS payload, length(payload::text) FROM done WHERE batch_id = batch('strict') ORDER BY item_no;
SELECT * FROM broken;

-- isolation => 'item': one item in a call, one call in a transaction, once each.
SELECT redrive.create_handler('single', 'say', 'set', isolation => 'item');
ALTER SEQUENCE calls RESTART;
SELECT submit('single', 'single', 100, '{"50": "22000"}') > 0 AS submitted;
CALL redrive.work();
SELECT last_value AS calls FROM calls;
SELECT count(DISTINCT top) AS transactions, max(place) AS items_of_a_call FROM done WHERE batch_id = batch('single');
SELECT * FROM told WHERE label = 'single';
SELECT * FROM broken;

-- item_timeout is that of a call; one of several items that takes longer is halved.
CREATE FUNCTION sleepy(items redrive.item[]) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    PERFORM scratch.take(items);
    PERFORM pg_sleep(60) FROM unnest(items) AS i WHERE i.payload = '33'; -- slow handler
END
$$;
SELECT redrive.create_handler('sleepy', 'sleepy', 'set', item_timeout => '100 ms', max_retries => 0);
SELECT submit('sleepy', 'sleepy', 60) > 0 AS submitted;
CALL redrive.work();
SELECT * FROM told WHERE label = 'sleepy';
SELECT item_no, error_class, sqlstate, message, detail FROM redrive.failed_items WHERE batch_id = batch('sleepy');
SELECT * FROM broken;

-- Other policies: a defect pauses, failures are tolerated or not, a transient error
-- is tried again at once, keys are unlocked with a callback.
CREATE TABLE unlocked (key text);
CREATE FUNCTION note_unlock(key text) RETURNS void LANGUAGE sql AS 'INSERT INTO scratch.unlocked VALUES (key)';
SELECT redrive.create_handler('policies', 'take', 'set', tolerated_failures => 3, on_unlock => 'note_unlock', max_retries => 0);
SELECT submit('policies', 'defect', 100, '{"60": "42P01"}') > 0 AS submitted;
CALL redrive.work();
SELECT label, state, succeeded, failed, waiting FROM progress WHERE label = 'defect';
SELECT pause_reason FROM redrive.batches WHERE label = 'defect';
SELECT count(*) AS unlocked, count(*) = (SELECT succeeded FROM progress WHERE label = 'defect') AS as_many_as_done FROM unlocked;
SELECT redrive.cancel_batch(batch('defect'));
DELETE FROM unlocked;
SELECT submit('policies', 'tolerated', 200, '{"20": "22000", "40": "22000", "60": "22000", "80": "22000"}') > 0 AS submitted;
CALL redrive.work();
SELECT state, failed, pause_reason FROM redrive.batches WHERE label = 'tolerated';
SELECT redrive.cancel_batch(batch('tolerated'));
CREATE FUNCTION deadlocked(items redrive.item[]) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    PERFORM scratch.take(items);
    IF cardinality(items) > 40 AND nextval('scratch.tries') = 1 OR items[1].item_no = 1 AND nextval('scratch.tries') <= 3 THEN
        RAISE EXCEPTION 'deadlock' USING ERRCODE = '40P01';
    END IF;
END
$$;
CREATE SEQUENCE tries;
SELECT redrive.create_handler('deadlocked', 'deadlocked', 'set', max_retries => 0);
SELECT submit('deadlocked', 'deadlocked', 100) > 0 AS submitted;
CALL redrive.work();
SELECT last_value AS tries FROM tries;
SELECT * FROM told WHERE label = 'deadlocked';
SELECT * FROM progress WHERE label = 'deadlocked';
SELECT * FROM broken;

-- The function is gone, or another one, when it is to be called.
SELECT submit('strict', 'changed', 40) > 0 AS submitted;
DROP FUNCTION strict_take;
CALL redrive.work();
SELECT state, pause_reason FROM redrive.batches WHERE label = 'changed';
CREATE FUNCTION strict_take(items redrive.item[]) RETURNS int LANGUAGE sql AS 'SELECT 1';
SELECT redrive.resume_batch(batch('changed'));
CALL redrive.work();
SELECT state, pause_reason FROM redrive.batches WHERE label = 'changed';
DROP FUNCTION strict_take;
CREATE FUNCTION strict_take(items redrive.item[]) RETURNS SETOF redrive.outcome LANGUAGE sql AS 'SELECT i.item_no, ''ignored''::redrive.outcome_kind, NULL, NULL, NULL::interval FROM unnest(items) AS i WHERE i.item_no <= 10';
SELECT redrive.resume_batch(batch('changed'));
CALL redrive.work();
SELECT * FROM progress WHERE label = 'changed';
SELECT * FROM broken;
DROP OWNED BY regress_sets;
DROP ROLE regress_sets;
