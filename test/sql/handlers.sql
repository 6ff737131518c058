-- Handlers: what can be made, changed, paused and dropped, by whom, and how
-- each mistake is answered.
\getenv here PG_ABS_SRCDIR
\set tools :here '/sql/tools.psql'
\i :tools

CREATE TABLE done (handler text, key text, payload jsonb, attempt int);

-- The three signatures, in the languages of the server.
CREATE FUNCTION f_payload(payload jsonb) RETURNS void LANGUAGE sql AS
$$ INSERT INTO scratch.done (handler, payload) VALUES ('payload', $1) $$;
CREATE FUNCTION f_key_payload(key text, payload jsonb) RETURNS int LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO scratch.done (handler, key, payload) VALUES ('key_payload', key, payload);
    RETURN 42;
END
$$;
CREATE FUNCTION f_item(item redrive.item) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO scratch.done (handler, key, payload, attempt) VALUES ('item', item.key, item.payload, item.attempt);
END
$$;
CREATE EXTENSION plpython3u SCHEMA pg_catalog;
CREATE FUNCTION f_python(payload jsonb) RETURNS text LANGUAGE plpython3u AS $$
import json
value = json.loads(payload)
plpy.execute(plpy.prepare("INSERT INTO scratch.done (handler, payload) VALUES ('python', $1)", ["jsonb"]), [json.dumps(value * 2)])
return "ignored"
$$;
-- rows that come one at a time
CREATE FUNCTION f_python_set(items redrive.item[]) RETURNS SETOF redrive.outcome LANGUAGE plpython3u AS $$
for item in items:
    if item["item_no"] == 2:
        yield {"item_no": 2, "outcome": "ignored", "message": "not wanted", "code": None, "delay": None}
$$;

SELECT redrive.create_handler('payload', 'f_payload');
SELECT redrive.create_handler('key payload', 'scratch.f_key_payload');
SELECT redrive.create_handler('item', 'f_item(redrive.item)');
SELECT redrive.create_handler('python', 'f_python', max_retries => 0, retry_delay => '0', isolation => 'item');

-- What is stored: qualified names, the signature found, the documented defaults.
SELECT name, kind, owner = current_user::regrole AS mine, function, signature, paused FROM redrive.handlers ORDER BY name;
\x
SELECT max_retries, retry_delay, retry_factor, retry_delay_max, stale_after, start_timeout, retry_window, item_timeout, isolation,
    commit_interval, max_workers, tolerated_failures, on_unlock, on_finish
FROM redrive.handlers WHERE name = 'payload';
\x

-- Each of them runs.
SELECT redrive.submit(h, ARRAY['1', '2']::jsonb[], ARRAY[h || ' one', NULL], label => h) > 0 AS submitted
FROM unnest(ARRAY['payload', 'key payload', 'item', 'python']) AS h;
CALL redrive.work();
SELECT * FROM done ORDER BY handler COLLATE "C", payload;
SELECT * FROM progress;
SELECT * FROM broken;

SELECT redrive.create_handler('python set', 'f_python_set', kind => 'set');
SELECT redrive.submit('python set', ARRAY['1', '2', '3']::jsonb[], label => 'python set') > 0 AS submitted;
CALL redrive.work();
SELECT state, succeeded, ignored FROM redrive.batch_progress WHERE label = 'python set';
SELECT item_no, state, message FROM redrive.failed_items WHERE handler = 'python set';
SELECT * FROM broken;

-- A strict function of (key, payload) cannot be called without a key.
CREATE FUNCTION f_strict(key text, payload jsonb) RETURNS void LANGUAGE sql STRICT AS
$$ INSERT INTO scratch.done (handler, key, payload) VALUES ('strict', $1, $2) $$;
SELECT redrive.create_handler('strict', 'f_strict');
SELECT redrive.submit('strict', ARRAY['1', '2']::jsonb[], ARRAY['a', NULL], label => 'strict') > 0 AS submitted;
CALL redrive.work();
SELECT key, payload FROM done WHERE handler = 'strict';
SELECT item_no, state, reason, sqlstate, message, hint FROM redrive.failed_items WHERE handler = 'strict';
SELECT * FROM broken;

-- No such function, or none that fits.
SELECT fails($$SELECT redrive.create_handler('h', 'nothing')$$);
SELECT fails($$SELECT redrive.create_handler('h', 'nowhere.nothing')$$);
SELECT fails($$SELECT redrive.create_handler('h', 'nothing(jsonb)')$$);
CREATE FUNCTION f_unfit(payload text) RETURNS void LANGUAGE sql AS '';
SELECT fails($$SELECT redrive.create_handler('h', 'f_unfit')$$);
SELECT fails($$SELECT redrive.create_handler('h', 'f_unfit(text)')$$);
SELECT fails($$SELECT redrive.create_handler('h', 'a.b.c.d')$$);
SELECT fails($$SELECT redrive.create_handler('h', '')$$);
-- What is no name.  Seen red: the server's error alone, without detail and hint.
SELECT fails($$SELECT redrive.create_handler('h', 'h; x')$$);
SELECT fails($$SELECT redrive.create_handler('h', 'h; x(jsonb)')$$);
SELECT fails($$SELECT redrive.create_handler('h', 'f_payload', on_finish => 'f(bigint, int)')$$);
-- a parenthesis that is part of the name
SELECT fails($$SELECT redrive.create_handler('h', '"no (thing"')$$);
SELECT fails($$SELECT redrive.create_handler('h', '"no (thing"(jsonb)')$$);
-- before PostgreSQL 16 this is an error of the server, 22P02
SELECT string_agg(f, ' ') ~ 'detail: .*hint: ' AS is_told FROM fails($$SELECT redrive.create_handler('h', 'h(')$$) AS f;
SELECT fails($$SELECT redrive.create_handler('h')$$);
SELECT fails($$SELECT redrive.create_handler('h', NULL, NULL)$$);
-- Two that fit: the argument types tell.
CREATE FUNCTION f_twice(payload jsonb) RETURNS void LANGUAGE sql AS '';
CREATE FUNCTION f_twice(key text, payload jsonb) RETURNS void LANGUAGE sql AS '';
SELECT fails($$SELECT redrive.create_handler('h', 'f_twice')$$);
SELECT redrive.create_handler('twice', 'f_twice(text, jsonb)');
SELECT function, signature FROM redrive.handlers WHERE name = 'twice';
-- A procedure, an aggregate, a set.
CREATE PROCEDURE p_row(payload jsonb) LANGUAGE sql AS '';
CREATE FUNCTION f_set(payload jsonb) RETURNS SETOF int LANGUAGE sql AS 'SELECT 1';
CREATE AGGREGATE a_row(jsonb) (SFUNC = jsonb_concat, STYPE = jsonb);
SELECT fails($$SELECT redrive.create_handler('h', 'p_row')$$);
SELECT fails($$SELECT redrive.create_handler('h', 'f_set')$$);
SELECT fails($$SELECT redrive.create_handler('h', 'a_row')$$);
-- Callbacks.
SELECT fails($$SELECT redrive.create_handler('h', 'f_payload', on_unlock => 'nothing')$$);
SELECT fails($$SELECT redrive.create_handler('h', 'f_payload', on_unlock => 'f_payload')$$);
SELECT fails($$SELECT redrive.create_handler('h', 'f_payload', on_finish => 'nothing')$$);
-- Kinds that do not fit the function, or are not there yet.
SELECT fails($$SELECT redrive.create_handler('h', 'f_payload', 'set')$$);
SELECT fails($$SELECT redrive.create_handler('h', 'f_payload', kind => 'external')$$);
-- Names.
SELECT fails($$SELECT redrive.create_handler('payload', 'f_payload')$$);
SELECT fails($$SELECT redrive.create_handler(NULL, 'f_payload')$$);
SELECT fails($$SELECT redrive.create_handler('', 'f_payload')$$);
SELECT fails(format('SELECT redrive.create_handler(%L, ''f_payload'')', repeat('x', 101)));
SELECT redrive.create_handler(repeat('x', 100), 'f_payload');
SELECT redrive.drop_handler(repeat('x', 100));

-- The range of each setting: just outside, then the borders.
SELECT v.argument || ' => ' || v.value AS given, f.*
FROM (VALUES
    (1, 'max_retries', '-1'), (2, 'max_retries', '1001'), (3, 'max_retries', 'NULL'),
    (4, 'retry_delay', '''-1 ms'''), (5, 'retry_delay', '''101 years'''),
    (6, 'retry_factor', '0.99'), (7, 'retry_factor', '100.01'), (8, 'retry_factor', '''NaN'''), (9, 'retry_factor', 'NULL'),
    (10, 'retry_delay_max', '''-1 ms'''), (11, 'retry_delay_max', '''101 years'''), (12, 'retry_delay_max', 'NULL'),
    (13, 'stale_after', '''0'''), (13, 'stale_after', '''101 years'''), (14, 'stale_after', 'NULL'),
    (15, 'start_timeout', '''0'''), (15, 'start_timeout', '''101 years'''), (16, 'start_timeout', 'NULL'),
    (17, 'retry_window', '''0'''), (17, 'retry_window', '''101 years'''), (18, 'retry_window', 'NULL'),
    (19, 'item_timeout', '''0.9 ms'''), (20, 'item_timeout', '''21 days'''),
    (21, 'isolation', 'NULL'),
    (22, 'commit_interval', '''0.9 ms'''), (23, 'commit_interval', '''61 min'''), (24, 'commit_interval', 'NULL'),
    (25, 'max_workers', '0'), (26, 'tolerated_failures', '-1')
) AS v (place, argument, value)
CROSS JOIN LATERAL fails(format('SELECT redrive.create_handler(''h'', ''f_payload'', %I => %s)', v.argument, v.value)) WITH ORDINALITY AS f (answer, line)
ORDER BY v.place, v.value DESC, f.line;
-- Each of these is a day when compared, and no time it can be added to.
SELECT s AS setting, v AS value, (SELECT f FROM fails(format('SELECT redrive.alter_handler(''payload'', %I => %L)', s, v)) AS f LIMIT 1) AS answer
FROM unnest(ARRAY['stale_after', 'start_timeout', 'retry_window']) AS s,
    unnest(ARRAY['1000000 years -359999999 days', '106751990 days -2562047736 hours', '-290000 years 104400001 days']) AS v
ORDER BY s, v;
SELECT redrive.create_handler('lowest', 'f_payload', max_retries => 0, retry_delay => '0', retry_factor => 1, retry_delay_max => '0',
    stale_after => '1 us', start_timeout => '1 us', retry_window => '1 us', item_timeout => '1 ms', commit_interval => '1 ms',
    max_workers => 1, tolerated_failures => 0);
SELECT redrive.create_handler('highest', 'f_payload', max_retries => 1000, retry_delay => '100 years', retry_factor => 100,
    retry_delay_max => '100 years', stale_after => '100 years', start_timeout => '100 years', retry_window => '100 years', item_timeout => '20 days', commit_interval => '1 hour', max_workers => 2147483647, tolerated_failures => 2147483647);
SELECT count(*) FROM redrive.handlers WHERE name IN ('lowest', 'highest');
-- The lowest settings work; one millisecond may be too short for an item.
SELECT redrive.alter_handler('lowest', unset => ARRAY['item_timeout']);
SELECT redrive.submit('lowest', ARRAY['1']::jsonb[], label => 'lowest') > 0 AS submitted;
CALL redrive.work();
SELECT * FROM progress WHERE label = 'lowest';

-- Change: what is NULL stays, what is listed in unset becomes NULL.
CREATE FUNCTION cb_unlock(key text) RETURNS void LANGUAGE sql AS '';
CREATE FUNCTION cb_finish(batch_id bigint, run_no int) RETURNS void LANGUAGE sql AS '';
SELECT redrive.alter_handler('payload', 'f_item', max_retries => 5, retry_delay => '2 s', retry_factor => 1.5, retry_delay_max => '3 s',
    stale_after => '4 s', start_timeout => '5 s', retry_window => '6 s', item_timeout => '7 s', isolation => 'item', commit_interval => '8 ms',
    max_workers => 9, tolerated_failures => 10, on_unlock => 'cb_unlock', on_finish => 'cb_finish');
\x
SELECT function, signature, max_retries, retry_delay, retry_factor, retry_delay_max, stale_after, start_timeout, retry_window, item_timeout, isolation,
    commit_interval, max_workers, tolerated_failures, on_unlock, on_finish
FROM redrive.handlers WHERE name = 'payload';
SELECT redrive.alter_handler('payload');
SELECT redrive.alter_handler('payload', unset => ARRAY['retry_delay', 'item_timeout', 'max_workers', 'tolerated_failures', 'on_unlock', 'on_finish']);
SELECT function, signature, max_retries, retry_delay, retry_factor, retry_delay_max, stale_after, start_timeout, retry_window, item_timeout, isolation,
    commit_interval, max_workers, tolerated_failures, on_unlock, on_finish
FROM redrive.handlers WHERE name = 'payload';
\x
-- It runs the new function.
SELECT redrive.submit('payload', ARRAY['"altered"']::jsonb[], label => 'altered') > 0 AS submitted;
CALL redrive.work();
SELECT handler, payload, attempt FROM done WHERE payload = '"altered"';
SELECT fails($$SELECT redrive.alter_handler('unknown', max_retries => 1)$$);
SELECT fails($$SELECT redrive.alter_handler(NULL, max_retries => 1)$$);
SELECT fails($$SELECT redrive.alter_handler('payload', 'nothing')$$);
SELECT fails($$SELECT redrive.alter_handler('payload', kind => 'set')$$);
SELECT redrive.alter_handler('payload', kind => 'row');
SELECT fails($$SELECT redrive.alter_handler('payload', on_unlock => 'nothing')$$);
SELECT fails($$SELECT redrive.alter_handler('payload', unset => ARRAY['max_retries'])$$);
SELECT fails($$SELECT redrive.alter_handler('payload', unset => ARRAY[NULL])$$);
SELECT fails($$SELECT redrive.alter_handler('payload', max_retries => -1)$$);
SELECT fails($$SELECT redrive.alter_handler('payload', retry_factor => 0)$$);
SELECT fails($$SELECT redrive.alter_handler('payload', commit_interval => '0')$$);

-- Pause: batches wait; resume: they go on.
SELECT redrive.pause_handler('python');
SELECT redrive.pause_handler('python');
SELECT redrive.submit('python', ARRAY['21']::jsonb[], label => 'paused') > 0 AS submitted;
CALL redrive.work();
SELECT * FROM progress WHERE label = 'paused';
SELECT handler, ready, paused FROM redrive.queue_stats WHERE handler = 'python';
SELECT redrive.resume_handler('python');
CALL redrive.work();
SELECT * FROM progress WHERE label = 'paused';
SELECT payload FROM done WHERE handler = 'python' AND payload = '42';
SELECT fails($$SELECT redrive.pause_handler('unknown')$$);
SELECT fails($$SELECT redrive.pause_handler(NULL)$$);
SELECT fails($$SELECT redrive.resume_handler('unknown')$$);
SELECT fails($$SELECT redrive.resume_handler(NULL)$$);

-- Drop: refused while batches live, in each state of life.
SELECT fails($$SELECT redrive.drop_handler('unknown')$$);
SELECT fails($$SELECT redrive.drop_handler(NULL)$$);
SELECT redrive.open_batch('item', label => 'live') > 0 AS opened;
SELECT fails($$SELECT redrive.drop_handler('item')$$);
SELECT redrive.add_items(batch('live'), ARRAY['1']::jsonb[], ARRAY['live key']);
SELECT redrive.seal_batch(batch('live'));
SELECT fails($$SELECT redrive.drop_handler('item')$$);
SELECT redrive.pause_batch(batch('live'));
SELECT fails($$SELECT redrive.drop_handler('item')$$);
SELECT redrive.cancel_batch(batch('live'));
-- A worker may still be in an item of it.
INSERT INTO redrive.chunks (batch_id, handler_id, part, run_no, kind, state, from_no, to_no, done_to, items, lease_token, worker_pid, worker_started_at, claimed_at, progress_at)
SELECT batch_id, handler_id, part, 1, 'first', 'running', 1, 1, 0, 1, 1, pg_backend_pid(), now(), now(), now() FROM redrive.batches WHERE label = 'live';
SELECT fails($$SELECT redrive.drop_handler('item')$$);
DELETE FROM redrive.chunks WHERE state = 'running';
INSERT INTO redrive.classification_rules (handler, sqlstate_pattern, error_class, action) VALUES ('item', 'P0001', 'mine', 'fail');
INSERT INTO redrive.crashes SELECT batch_id, 1, 1, now(), now() FROM redrive.batches WHERE label = 'live';
SELECT redrive.drop_handler('item');
-- Its batches, items and rules went with it; nobody else's did.
SELECT count(*) FROM redrive.classification_rules WHERE error_class = 'mine';
SELECT label FROM progress;
SELECT (SELECT count(*) FROM redrive.item_blocks AS i WHERE NOT EXISTS (SELECT FROM redrive.batches AS b WHERE b.batch_id = i.batch_id)) AS item_blocks,
    (SELECT count(*) FROM redrive.chunks AS c WHERE NOT EXISTS (SELECT FROM redrive.batches AS b WHERE b.batch_id = c.batch_id)) AS chunks,
    (SELECT count(*) FROM redrive.locks AS l WHERE NOT EXISTS (SELECT FROM redrive.batches AS b WHERE b.batch_id = l.batch_id)) AS locks,
    (SELECT count(*) FROM redrive.crashes) AS crashes;
-- The name is free again.
SELECT redrive.create_handler('item', 'f_item');
SELECT * FROM broken;

-- The function may go: the batch is paused, says why, and goes on when the
-- function is back.
SELECT redrive.submit('item', ARRAY['1', '2']::jsonb[], label => 'function gone') > 0 AS submitted;
DROP FUNCTION f_item;
CALL redrive.work();
SELECT label, state, pending, waiting, failed, pause_reason FROM redrive.batch_progress WHERE label = 'function gone';
SELECT * FROM broken;
CREATE FUNCTION f_item(item redrive.item) RETURNS void LANGUAGE sql AS
$$ INSERT INTO scratch.done (handler, payload, attempt) VALUES ('back', ($1).payload, ($1).attempt) $$;
SELECT redrive.resume_batch(batch('function gone'));
CALL redrive.work();
SELECT handler, payload, attempt FROM done WHERE handler = 'back' ORDER BY payload;
SELECT label, state, succeeded, pause_reason FROM redrive.batch_progress WHERE label = 'function gone';
SELECT * FROM broken;

-- Roles: the creator owns; others are refused; members of the owner may.
CREATE ROLE regress_handlers_a LOGIN;
CREATE ROLE regress_handlers_b LOGIN;
CREATE ROLE regress_handlers_member LOGIN IN ROLE regress_handlers_a;
CREATE ROLE regress_handlers_nobody LOGIN;
SELECT redrive.grant_user('regress_handlers_a');
SELECT redrive.grant_user('regress_handlers_b');
SELECT redrive.grant_user('regress_handlers_member');
CREATE FUNCTION f_private(payload jsonb) RETURNS void LANGUAGE sql AS '';
REVOKE ALL ON FUNCTION f_private FROM PUBLIC;
CREATE FUNCTION f_public(payload jsonb) RETURNS void LANGUAGE sql AS '';
SET SESSION AUTHORIZATION regress_handlers_a;
SELECT redrive.create_handler('of a', 'f_public');
SELECT fails($$SELECT redrive.create_handler('private', 'f_private')$$);
SELECT fails($$SELECT redrive.create_handler('of a', 'f_public')$$);
SELECT fails($$SELECT redrive.create_handler('private', 'f_public', on_unlock => 'cb_private')$$);
SET SESSION AUTHORIZATION regress_handlers_b;
SELECT fails($$SELECT redrive.create_handler('of a', 'f_public')$$);
SELECT fails($$SELECT redrive.alter_handler('of a', max_retries => 1)$$);
SELECT fails($$SELECT redrive.drop_handler('of a')$$);
SELECT fails($$SELECT redrive.pause_handler('of a')$$);
SELECT fails($$SELECT redrive.resume_handler('of a')$$);
SELECT fails($$SELECT redrive.submit('of a', ARRAY['1']::jsonb[])$$);
SET SESSION AUTHORIZATION regress_handlers_member;
SELECT redrive.alter_handler('of a', max_retries => 7);
SELECT redrive.pause_handler('of a');
SELECT redrive.resume_handler('of a');
SET SESSION AUTHORIZATION regress_handlers_nobody;
SELECT fails($$SELECT redrive.create_handler('nobody', 'f_public')$$);
SELECT fails($$SELECT redrive.alter_handler('of a', max_retries => 1)$$);
SELECT fails($$SELECT redrive.drop_handler('of a')$$);
RESET SESSION AUTHORIZATION;
SELECT name, owner, max_retries FROM redrive.handlers WHERE name = 'of a';
-- A superuser may too, and the owner stays.
SELECT redrive.alter_handler('of a', max_retries => 8);
SELECT name, owner, max_retries FROM redrive.handlers WHERE name = 'of a';
-- The right to execute the function is checked again when it runs.
SET SESSION AUTHORIZATION regress_handlers_a;
SELECT redrive.submit('of a', ARRAY['1']::jsonb[], label => 'right gone') > 0 AS submitted;
RESET SESSION AUTHORIZATION;
REVOKE ALL ON FUNCTION f_public FROM PUBLIC;
SET SESSION AUTHORIZATION regress_handlers_a;
CALL redrive.work();
RESET SESSION AUTHORIZATION;
SELECT label, state, pending, waiting, failed, pause_reason FROM redrive.batch_progress WHERE label = 'right gone';
GRANT EXECUTE ON FUNCTION f_public TO regress_handlers_a;
SET SESSION AUTHORIZATION regress_handlers_a;
SELECT redrive.resume_batch(batch('right gone'));
CALL redrive.work();
RESET SESSION AUTHORIZATION;
SELECT label, state, succeeded FROM redrive.batch_progress WHERE label = 'right gone';
SELECT * FROM broken;

SELECT redrive.revoke_user(r) FROM unnest(ARRAY['a', 'b', 'member']) AS x, LATERAL (SELECT ('regress_handlers_' || x)::name) AS y (r);
SELECT redrive.drop_handler('of a');
DROP OWNED BY regress_handlers_a, regress_handlers_b, regress_handlers_member, regress_handlers_nobody;
DROP ROLE regress_handlers_a, regress_handlers_b, regress_handlers_member, regress_handlers_nobody;
SET client_min_messages = warning;
DROP SCHEMA scratch CASCADE;
DROP EXTENSION plpython3u;
