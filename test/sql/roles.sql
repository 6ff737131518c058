-- Roles: a hostile tenant with CREATE on a schema, temporary objects and handlers
-- of its own, against another tenant and against us.  docs/security.md says what
-- is promised; what needs workers is in test/t/023_roles.pl.
\getenv here PG_ABS_SRCDIR
\set tools :here '/sql/tools.psql'
\i :tools

CREATE ROLE regress_roles_a LOGIN;
CREATE ROLE regress_roles_b LOGIN;
CREATE ROLE regress_roles_friend;
CREATE ROLE regress_roles_member LOGIN NOINHERIT IN ROLE regress_roles_a;
CREATE ROLE regress_roles_monitor LOGIN;
CREATE ROLE regress_roles_nobody LOGIN;
GRANT regress_roles_friend TO regress_roles_b;
SELECT redrive.grant_user(r) FROM unnest(ARRAY['regress_roles_a', 'regress_roles_b', 'regress_roles_member']) AS r;
SELECT redrive.grant_monitor('regress_roles_monitor');

-- How a statement ends: its SQLSTATE; 00000 when it did not fail.
CREATE FUNCTION code(statement text) RETURNS text LANGUAGE plpgsql AS $$
BEGIN
    EXECUTE statement;
    RETURN '00000';
EXCEPTION WHEN OTHERS THEN
    RETURN SQLSTATE;
END
$$;
-- Who ran something.  Whoever is not the owner of a handler shows up here.
CREATE TABLE traces (what text, who name DEFAULT current_user);
GRANT SELECT, INSERT ON traces TO PUBLIC;

-- Our tables, sequences and internal functions.  Red with GRANT ALL ON ALL TABLES
-- IN SCHEMA redrive in _grant_views().
SELECT r, c.relname
FROM unnest(ARRAY['regress_roles_a', 'regress_roles_monitor', 'regress_roles_nobody']) AS r CROSS JOIN pg_class AS c
WHERE c.relnamespace = 'redrive'::regnamespace
  AND CASE c.relkind WHEN 'S' THEN has_sequence_privilege(r, c.oid, 'USAGE, SELECT, UPDATE')
           WHEN 'v' THEN has_table_privilege(r, c.oid, 'INSERT, UPDATE, DELETE, TRUNCATE, REFERENCES, TRIGGER')
           ELSE has_table_privilege(r, c.oid, 'SELECT, INSERT, UPDATE, DELETE, TRUNCATE, REFERENCES, TRIGGER') END;
SELECT r, c.relname, a.attname
FROM unnest(ARRAY['regress_roles_a', 'regress_roles_monitor', 'regress_roles_nobody']) AS r CROSS JOIN pg_class AS c JOIN pg_attribute AS a ON a.attrelid = c.oid
WHERE c.relnamespace = 'redrive'::regnamespace AND c.relkind IN ('r', 'p') AND NOT a.attisdropped AND has_column_privilege(r, c.oid, a.attnum, 'SELECT, INSERT, UPDATE, REFERENCES');
SELECT r, p.oid::regprocedure
FROM unnest(ARRAY['regress_roles_a', 'regress_roles_monitor', 'regress_roles_nobody']) AS r CROSS JOIN pg_proc AS p
WHERE p.pronamespace = 'redrive'::regnamespace AND has_function_privilege(r, p.oid, 'EXECUTE')
  AND (p.proname LIKE '\_%' AND p.proname NOT LIKE '\_report\_%' OR p.proname IN ('run_pass', 'http_request', 'set_retention', 'grant_user', 'grant_monitor', 'revoke_user'))
ORDER BY 1, 2;

SET SESSION AUTHORIZATION regress_roles_b;
CREATE FUNCTION spy() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN INSERT INTO traces VALUES ('spy'); RETURN NEW; END $$;
SELECT s AS statement, code(s) FROM unnest(ARRAY[
    'SELECT FROM redrive.batches', 'SELECT batch_id FROM redrive.batches', 'SELECT payloads FROM redrive.item_blocks_0',
    'INSERT INTO redrive.handlers (name) VALUES (''x'')', 'UPDATE redrive.chunks SET lease_token = 1', 'DELETE FROM redrive.locks', 'TRUNCATE redrive.callbacks',
    'INSERT INTO redrive.classification_rules (error_class, action) VALUES (''x'', ''ignore'')',
    'INSERT INTO redrive.batch_progress (batch_id) VALUES (1)', 'UPDATE redrive.failed_items SET state = ''failed''', 'DELETE FROM redrive.items',
    'LOCK TABLE redrive.batches IN ACCESS SHARE MODE', 'SELECT batch_id FROM redrive.batch_progress FOR UPDATE',
    'SELECT nextval(''redrive.chunks_chunk_id_seq'')', 'SELECT setval(''redrive.batches_batch_id_seq'', 1)', 'SELECT last_value FROM redrive.chunks_chunk_id_seq',
    'CREATE TRIGGER spy BEFORE UPDATE ON redrive.batches FOR EACH ROW EXECUTE FUNCTION spy()',
    'CREATE TRIGGER spy BEFORE INSERT ON redrive.item_blocks_0 FOR EACH ROW EXECUTE FUNCTION spy()',
    'CREATE TRIGGER spy INSTEAD OF INSERT ON redrive.items FOR EACH ROW EXECUTE FUNCTION spy()',
    'CREATE RULE spy AS ON UPDATE TO redrive.batches DO ALSO INSERT INTO traces VALUES (''rule'')',
    'CREATE RULE "_RETURN" AS ON SELECT TO redrive.queue_stats DO INSTEAD SELECT 1',
    'CREATE POLICY spy ON redrive.batches USING (true)', 'ALTER TABLE redrive.batches ENABLE ROW LEVEL SECURITY', 'ALTER TABLE redrive.batches DISABLE TRIGGER ALL',
    'CREATE INDEX ON redrive.batches (code(label))', 'CREATE STATISTICS spy ON handler_id, state FROM redrive.batches',
    'CREATE TABLE child () INHERITS (redrive.handlers)', 'CREATE TABLE refers (b bigint REFERENCES redrive.batches)',
    'ALTER TABLE traces ATTACH PARTITION redrive.handlers DEFAULT', 'CREATE FUNCTION redrive.plant() RETURNS void LANGUAGE sql AS ''''',
    'ALTER FUNCTION redrive._fold(bigint) OWNER TO regress_roles_b', 'ALTER VIEW redrive.items SET (security_barrier = false)',
    'ALTER EXTENSION pg_redrive DROP TABLE redrive.handlers', 'DROP EXTENSION pg_redrive', 'COMMENT ON SCHEMA redrive IS ''mine''',
    'CREATE FUNCTION plant() RETURNS void LANGUAGE c AS ''pg_redrive'', ''redrive_as_owner''',
    'SELECT redrive._fold(1)', 'SELECT redrive._give_back(1, 1, true)', 'SELECT redrive._pause_batch(10, 1)', 'SELECT redrive._claim(10, 1, now(), 1, true)',
    'SELECT redrive._wake(10)', 'SELECT redrive._lock_pass(''purge'')', 'SELECT redrive.rescue_stale()', 'SELECT redrive.retry_failed()', 'SELECT redrive.push_tasks()', 'SELECT redrive.purge()',
    'SELECT redrive.schedule_passes()', 'SELECT redrive.unschedule_passes()', 'CALL redrive.run_pass(''purge'')']) AS s;
RESET SESSION AUTHORIZATION;

-- What ALTER DEFAULT PRIVILEGES gives does not reach us: with a right to write, or
-- to make a trigger, a tenant would be the owner of the extension.  Red without
-- the loop in sql/99_end.sql.
BEGIN;
ALTER DEFAULT PRIVILEGES GRANT ALL ON TABLES TO regress_roles_b;
ALTER DEFAULT PRIVILEGES GRANT ALL ON SEQUENCES TO regress_roles_b;
ALTER DEFAULT PRIVILEGES GRANT ALL ON ROUTINES TO regress_roles_b, PUBLIC;
ALTER DEFAULT PRIVILEGES GRANT ALL ON SCHEMAS TO regress_roles_b, PUBLIC;
SET LOCAL client_min_messages = warning;
DROP EXTENSION pg_redrive CASCADE;
CREATE EXTENSION pg_redrive;
SELECT count(*) FILTER (WHERE has_table_privilege('regress_roles_b', oid, 'SELECT, INSERT, UPDATE, DELETE, TRUNCATE, REFERENCES, TRIGGER')) AS granted, count(*) > 40 AS all_there
FROM pg_class WHERE relnamespace = 'redrive'::regnamespace AND relkind <> 'S';
SELECT count(*) FILTER (WHERE has_sequence_privilege('regress_roles_b', oid, 'USAGE, SELECT, UPDATE')) AS granted FROM pg_class WHERE relnamespace = 'redrive'::regnamespace AND relkind = 'S';
SELECT count(*) FILTER (WHERE has_function_privilege('regress_roles_b', oid, 'EXECUTE')) AS granted FROM pg_proc WHERE pronamespace = 'redrive'::regnamespace;
SELECT has_schema_privilege('regress_roles_b', 'redrive', 'USAGE, CREATE') AS granted;
ROLLBACK;

-- Operators and functions that fit better than those of pg_catalog, in the
-- search_path of the superuser who grants rights.  Red without the search_path of
-- grant_user(), grant_monitor() or revoke_user() in sql/90_grants.sql.
SET SESSION AUTHORIZATION regress_roles_b;
CREATE FUNCTION plant(name, name) RETURNS boolean LANGUAGE plpgsql AS $$ BEGIN INSERT INTO traces VALUES ('(name, name)'); RETURN $1 OPERATOR(pg_catalog.~~) $2::text; END $$;
CREATE FUNCTION plant_not(name, name) RETURNS boolean LANGUAGE plpgsql AS $$ BEGIN INSERT INTO traces VALUES ('(name, name)'); RETURN $1 OPERATOR(pg_catalog.!~~) $2::text; END $$;
CREATE FUNCTION plant(oid, regnamespace) RETURNS boolean LANGUAGE plpgsql AS $$ BEGIN INSERT INTO traces VALUES ('(oid, regnamespace)'); RETURN $1 OPERATOR(pg_catalog.=) $2::oid; END $$;
CREATE FUNCTION format(text, name) RETURNS text LANGUAGE plpgsql AS $$ BEGIN INSERT INTO traces VALUES ('format'); RETURN pg_catalog.format($1, VARIADIC ARRAY[$2]); END $$;
CREATE FUNCTION clock_timestamp() RETURNS timestamptz LANGUAGE plpgsql AS $$ BEGIN INSERT INTO traces VALUES ('clock_timestamp'); RETURN 'infinity'; END $$;
CREATE OPERATOR ~~ (LEFTARG = name, RIGHTARG = name, FUNCTION = plant);
CREATE OPERATOR !~~ (LEFTARG = name, RIGHTARG = name, FUNCTION = plant_not);
CREATE OPERATOR = (LEFTARG = oid, RIGHTARG = regnamespace, FUNCTION = plant);
RESET SESSION AUTHORIZATION;
SHOW search_path;
SELECT redrive.grant_user('regress_roles_nobody'), redrive.grant_monitor('regress_roles_nobody'), redrive.revoke_user('regress_roles_nobody'), redrive.set_retention('30 days');
SELECT count(*) >= 0 AS verified FROM redrive.verify();
SELECT count(*) >= 0 AS looked FROM redrive.stale_batches_at(now());
SELECT code('SELECT redrive.schedule_passes()'), code('SELECT redrive.unschedule_passes()');
CALL redrive.run_pass('purge');
SELECT what, who FROM traces;
DROP OPERATOR ~~ (name, name), !~~ (name, name), = (oid, regnamespace);
DROP FUNCTION scratch.format(text, name), scratch.clock_timestamp();
-- Those that do without a search_path: in their bodies every operator and every
-- function fits the types exactly, so that pg_catalog comes first.
SELECT p.oid::regprocedure AS function
FROM pg_proc AS p JOIN pg_language AS l ON l.oid = p.prolang
WHERE p.pronamespace = 'redrive'::regnamespace AND p.proname NOT LIKE '\_%' AND l.lanname <> 'c' AND NOT coalesce(p.proconfig @> ARRAY['search_path=pg_catalog, pg_temp'], false)
ORDER BY 1;

-- Nobody can keep the passes from running by taking a lock first.  Red with
-- pg_try_advisory_xact_lock(hashtext('pg_redrive'), hashtext(pass)) in _pass().
SET SESSION AUTHORIZATION regress_roles_b;
BEGIN;
SELECT count(pg_advisory_xact_lock(hashtext('pg_redrive'), hashtext(p))) FROM unnest(ARRAY['rescue_stale', 'retry_failed', 'purge']) AS p;
SELECT count(pg_advisory_xact_lock(l.classid::int, l.objid::int))
FROM pg_locks AS l WHERE l.locktype = 'advisory';
PREPARE TRANSACTION 'roles';
RESET SESSION AUTHORIZATION;
BEGIN;
SELECT p.outcome FROM redrive.rescue_stale() AS p UNION ALL SELECT p.outcome FROM redrive.retry_failed() AS p UNION ALL SELECT p.outcome FROM redrive.purge() AS p;
-- and the lock that they do take is there
SELECT count(*), min(objsubid) AS class FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid();
COMMIT;
ROLLBACK PREPARED 'roles';

-- Nor by a callback that does not end: purge leaves it.  Red without SKIP LOCKED in
-- redrive._purge_batches().
SET SESSION AUTHORIZATION regress_roles_b;
CREATE FUNCTION nothing(payload jsonb) RETURNS void LANGUAGE sql AS '';
SELECT redrive.create_handler('b', 'nothing');
SELECT redrive.send('b', '1') AS old \gset
CALL redrive.work();
RESET SESSION AUTHORIZATION;
INSERT INTO redrive.callbacks (handler_id, batch_id, kind, run_no) SELECT handler_id, batch_id, 'on_finish', run_no FROM redrive.batches;
BEGIN;
SELECT count(*) FROM (SELECT FROM redrive.callbacks FOR UPDATE) AS running;
PREPARE TRANSACTION 'roles';
SET lock_timeout = '1s';
SELECT redrive._purge_batches(0, 'infinity', 10) AS purged, (SELECT count(*) FROM redrive.callbacks) AS left_alone;
RESET lock_timeout;
ROLLBACK PREPARED 'roles';
DELETE FROM redrive.callbacks;

-- Two tenants.  a has batches in many states; b tries everything on them.
SET SESSION AUTHORIZATION regress_roles_a;
CREATE FUNCTION fails_secretly(key text, payload jsonb) RETURNS void LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'secret of %', key; END $$;
SELECT redrive.create_handler('a', 'fails_secretly', max_retries => 0);
SELECT redrive.submit('a', ARRAY['"secret 1"']::jsonb[], ARRAY['key 1'], label => 'failed', idempotency_key => 'once') AS failed \gset
CALL redrive.work();
SELECT redrive.submit('a', ARRAY['"secret 2"']::jsonb[], ARRAY['key 2'], label => 'ready') AS ready \gset
SELECT redrive.open_batch('a', label => 'open') AS open \gset
SELECT redrive.submit('a', ARRAY['"secret 3"']::jsonb[], label => 'paused') AS paused \gset
SELECT redrive.pause_batch(:paused);
RESET SESSION AUTHORIZATION;
INSERT INTO redrive.classification_rules (handler, message_pattern, error_class, action) VALUES ('a', 'secret', 'secret', 'ignore');
CREATE TABLE before AS SELECT b.*, h.name, h.function, h.paused FROM redrive.batches AS b JOIN redrive.handlers AS h USING (handler_id);
SET SESSION AUTHORIZATION regress_roles_b;
SELECT s AS statement, code(replace(replace(replace(replace(s, 'FAILED', :'failed'), 'READY', :'ready'), 'OPEN', :'open'), 'PAUSED', :'paused')) FROM unnest(ARRAY[
    'SELECT redrive.create_handler(''a'', ''nothing'')', 'SELECT redrive.alter_handler(''a'', function => ''nothing'')', 'SELECT redrive.drop_handler(''a'')',
    'SELECT redrive.pause_handler(''a'')', 'SELECT redrive.resume_handler(''a'')',
    'SELECT redrive.submit(''a'', ARRAY[''1'']::jsonb[])', 'SELECT redrive.submit(''a'', ARRAY[''1'']::jsonb[], idempotency_key => ''once'')',
    'SELECT redrive.submit(''a'', ARRAY[''1'']::jsonb[], ARRAY[''key 2''])', 'SELECT redrive.submit_query(''a'', ''SELECT NULL::text, ''''1''''::jsonb'')',
    'SELECT redrive.open_batch(''a'')', 'SELECT redrive.send(''a'', ''1'')', 'SELECT redrive.add_items(OPEN, ARRAY[''1'']::jsonb[])', 'SELECT redrive.seal_batch(OPEN)',
    'SELECT redrive.pause_batch(READY)', 'SELECT redrive.resume_batch(PAUSED)', 'SELECT redrive.cancel_batch(READY)', 'SELECT redrive.redrive(FAILED)',
    'SELECT redrive.is_locked(''a'', ''key 2'')', 'SELECT redrive.classify(''a'', ''P0001'', ''secret'')']) AS s;
CALL redrive.wait(:failed);
\echo :SQLSTATE
-- Not even a member, before it has the rights that it does not inherit.
SET SESSION AUTHORIZATION regress_roles_member;
SELECT code('SELECT redrive.send(''a'', ''1'')'), code(format('SELECT redrive.cancel_batch(%s)', :ready)), (SELECT count(*) FROM redrive.batch_progress) AS sees;
SET ROLE regress_roles_a;
SELECT code('SELECT redrive.send(''a'', ''1'')'), (SELECT count(*) FROM redrive.batch_progress) AS sees;
RESET SESSION AUTHORIZATION;
SELECT redrive.cancel_batch(max(batch_id)) FROM redrive.batches;
SELECT count(*) AS changed FROM (SELECT * FROM before EXCEPT SELECT b.*, h.name, h.function, h.paused FROM redrive.batches AS b JOIN redrive.handlers AS h USING (handler_id)) AS c;
-- Keys and idempotency keys are those of a handler: b cannot find out which a has.
SET SESSION AUTHORIZATION regress_roles_b;
SELECT redrive.submit('b', ARRAY['1']::jsonb[], ARRAY['key 2'], label => 'own', idempotency_key => 'once') > :failed AS own;
SELECT count(*) AS seen, count(*) FILTER (WHERE r::text ~ 'secret|key 1') AS secrets FROM redrive.failure_groups AS r;
SELECT count(*) FROM redrive.verify() WHERE batch_id <> batch('own');
SELECT count(*) FROM redrive.stale_batches_at('infinity') WHERE batch_id <> batch('own');
-- Red with l.acted in place of its CASE in redrive.pass_history.
SELECT count(*) > 0 AS passes, count(acted) + count(more) + count(detail) AS of_all FROM redrive.pass_history;
SET SESSION AUTHORIZATION regress_roles_monitor;
SELECT count(*) > 0 AS passes, count(acted) = count(*) AS of_all FROM redrive.pass_history;
RESET SESSION AUTHORIZATION;

-- What the server itself tells: statistics of columns, sequences.
ANALYZE redrive.batches, redrive.failures, redrive.locks;
SELECT count(*) > 0 AS there FROM pg_stats WHERE schemaname = 'redrive' AND most_common_vals IS NOT NULL;
SET SESSION AUTHORIZATION regress_roles_b;
SELECT count(*) FROM pg_stats WHERE schemaname = 'redrive';
SELECT count(last_value) FROM pg_sequences WHERE schemaname = 'redrive';
SET SESSION AUTHORIZATION regress_roles_monitor;
SELECT tablename, attname FROM pg_stats WHERE schemaname = 'redrive';
RESET SESSION AUTHORIZATION;

-- A session that is more than the handler's owner: a superuser who has set the
-- role and works for b.  None of this makes b more than b.  Red without
-- SECURITY_LOCAL_USERID_CHANGE in redrive_enter_user_code(); the cursor, without
-- redrive_check_user_command() in the utility hook.
SET SESSION AUTHORIZATION regress_roles_b;
CREATE FUNCTION escape() RETURNS text LANGUAGE plpgsql AS $$ BEGIN RESET ROLE; INSERT INTO traces VALUES ('escaped'); RETURN ''; END $$;
CREATE TABLE deeds (n int, deed text);
INSERT INTO deeds SELECT n, d FROM unnest(ARRAY[
    'RESET ROLE', 'SET ROLE NONE', 'SET LOCAL ROLE NONE', 'SET ROLE regress_roles_friend', 'SET SESSION AUTHORIZATION DEFAULT', 'RESET SESSION AUTHORIZATION',
    'SET SESSION AUTHORIZATION regress_roles_b', 'SELECT set_config(''role'', ''none'', false)', 'SELECT set_config(''session_authorization'', ''regress_roles_a'', false)',
    'UPDATE pg_settings SET setting = ''none'' WHERE name = ''role''', 'RESET ALL', 'DISCARD ALL', 'DO $x$ BEGIN RESET ROLE; END $x$', 'SELECT escape()', 'SELECT as_friend()',
    'DECLARE c CURSOR WITH HOLD FOR SELECT escape()', 'DECLARE c CURSOR FOR SELECT escape()',
    'SET session_replication_role = replica', 'SET row_security = off', 'ALTER ROLE CURRENT_USER SUPERUSER', 'COMMIT', 'CALL redrive.work()', 'CALL redrive.wait(1)']) WITH ORDINALITY AS d (d, n);
CREATE TABLE done (deed text, code text, who name DEFAULT current_user);
CREATE FUNCTION misbehave(payload jsonb) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    v_deed text := (SELECT d.deed FROM scratch.deeds AS d WHERE d.n = payload::int);
BEGIN
    INSERT INTO scratch.done VALUES (v_deed, scratch.code(v_deed));
END
$$;
-- A function of somebody else runs as he, if he says so, and no longer.
SET ROLE regress_roles_friend;
CREATE FUNCTION as_friend() RETURNS text LANGUAGE plpgsql SECURITY DEFINER AS $$ BEGIN INSERT INTO scratch.traces VALUES ('definer'); RESET ROLE; RETURN ''; END $$;
CREATE FUNCTION of_friend(payload jsonb) RETURNS void LANGUAGE sql SECURITY DEFINER AS $$ INSERT INTO scratch.traces VALUES ('definer as handler') $$;
RESET SESSION AUTHORIZATION;
ALTER ROLE regress_roles_b SET search_path = scratch;
SET ROLE regress_roles_b;
SELECT redrive.create_handler('misbehave', 'misbehave'), redrive.create_handler('of friend', 'of_friend');
SELECT redrive.submit('of friend', ARRAY['1', '2']::jsonb[], label => 'of friend') > 0 AS submitted;
SELECT redrive.submit('misbehave', array_agg(to_jsonb(n)), label => 'misbehave') > 0 AS submitted FROM deeds;
CALL redrive.work();
SELECT current_user;
RESET ROLE;
SELECT d.deed, o.code, o.who FROM deeds AS d LEFT JOIN done AS o ON o.deed = d.deed ORDER BY d.n;
SELECT what, who, count(*) FROM traces GROUP BY what, who ORDER BY what;
SELECT label, state, succeeded FROM progress WHERE label IN ('misbehave', 'of friend');

-- A deferred trigger that puts its deed off to the commit.  Red without the
-- second check of redrive_check_user_command(): then it runs, as the superuser.
TRUNCATE traces;
SET ROLE regress_roles_b;
CREATE TABLE late (n int);
CREATE FUNCTION put_off() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF NEW.n = 1 THEN
        SET CONSTRAINTS ALL DEFERRED;
        INSERT INTO late VALUES (2);
    ELSE
        PERFORM scratch.escape();
    END IF;
    RETURN NULL;
END
$$;
CREATE CONSTRAINT TRIGGER put_off AFTER INSERT ON late DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION put_off();
CREATE FUNCTION comes_late(payload jsonb) RETURNS void LANGUAGE sql AS 'INSERT INTO scratch.late VALUES (payload::int)';
CREATE FUNCTION unlocks_late(key text) RETURNS void LANGUAGE sql AS 'INSERT INTO scratch.late VALUES (key::int)';
SELECT redrive.create_handler('late', 'comes_late'), redrive.create_handler('unlocks late', 'nothing', on_unlock => 'unlocks_late');
SELECT redrive.submit('late', ARRAY['1']::jsonb[], label => 'late') > 0 AS submitted;
SELECT redrive.submit('unlocks late', ARRAY['1']::jsonb[], ARRAY['1'], label => 'unlocks late') > 0 AS submitted;
CALL redrive.work();
SELECT current_user;
RESET ROLE;
SELECT count(*) AS escaped FROM traces;
SELECT label, state, succeeded, waiting FROM progress WHERE label IN ('late', 'unlocks late');
SELECT message, detail, hint FROM redrive.failed_items WHERE handler = 'late';
SELECT kind, failures > 0 AS tried, message FROM redrive.callbacks;
-- In the handler itself constraints may be deferred, as ever.
SET ROLE regress_roles_b;
CREATE FUNCTION defers(payload jsonb) RETURNS void LANGUAGE plpgsql AS $$ BEGIN SET CONSTRAINTS ALL DEFERRED; INSERT INTO scratch.late VALUES (3); END $$;
CREATE OR REPLACE FUNCTION escape() RETURNS text LANGUAGE sql AS 'SELECT ''''';
SELECT redrive.create_handler('defers', 'defers');
SELECT redrive.submit('defers', ARRAY['1', '2']::jsonb[], label => 'defers') > 0 AS submitted;
CALL redrive.work();
RESET ROLE;
SELECT label, state, succeeded FROM progress WHERE label = 'defers';

-- A handler that turns to us: on its own batch, in its own item.  The books hold.
SET SESSION AUTHORIZATION regress_roles_b;
CREATE FUNCTION turns(item redrive.item) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO scratch.done SELECT s, scratch.code(s) FROM unnest(ARRAY[
        format('SELECT redrive.add_items(%s, ARRAY[''1'']::jsonb[])', item.batch_id), format('SELECT redrive.seal_batch(%s)', item.batch_id),
        format('SELECT redrive.redrive(%s)', item.batch_id), 'SELECT redrive.drop_handler(''turns'')', 'SELECT redrive.alter_handler(''turns'', max_retries => 1)',
        'SELECT redrive.send(''b'', ''1'')', format('SELECT redrive.pause_batch(%s)', item.batch_id), format('SELECT redrive.resume_batch(%s)', item.batch_id),
        format('SELECT redrive.cancel_batch(%s)', item.batch_id)]) AS s WHERE item.item_no = 2;
    PERFORM 1 / (item.item_no - 3);
END
$$;
SELECT redrive.create_handler('turns', 'turns', max_retries => 0);
SELECT redrive.submit('turns', array_agg(to_jsonb(n)), array_agg('key ' || n), label => 'turns') > 0 AS submitted FROM generate_series(1, 20) AS n;
TRUNCATE done;
CALL redrive.work();
SELECT regexp_replace(deed, '\d+', 'N') AS deed, code, count(*) FROM done GROUP BY 1, 2 ORDER BY 1;
RESET SESSION AUTHORIZATION;
SELECT label, state, total, succeeded + cancelled AS done, pending + running + waiting AS open FROM progress WHERE label = 'turns';

-- Names and texts that would mean something if they were pasted somewhere.
CREATE SCHEMA "s'"".$1 @ %s" AUTHORIZATION regress_roles_b;
SET SESSION AUTHORIZATION regress_roles_b;
CREATE FUNCTION "s'"".$1 @ %s"."f(jsonb); RESET ROLE; -- '%s"(key text, payload jsonb) RETURNS void LANGUAGE plpgsql AS $$
BEGIN RAISE EXCEPTION '%', key USING DETAIL = '%s %I $1 @ \', HINT = '''; RESET ROLE; --', ERRCODE = 'P0001', CONSTRAINT = 'c''%s"'; END $$;
SELECT redrive.create_handler('''; %s $1 @ "', '"s''"".$1 @ %s"."f(jsonb); RESET ROLE; -- ''%s"(text, jsonb)', max_retries => 0);
SELECT redrive.submit('''; %s $1 @ "', ARRAY['"%s"']::jsonb[], ARRAY['''); %n%s $1 @ \'], label => '%s%n $1 @ ''" \', idempotency_key => '%s') > 0 AS submitted;
CALL redrive.work();
SELECT handler, key, message, detail, hint, constraint_name FROM redrive.failed_items WHERE batch_id = batch('%s%n $1 @ ''" \');
SELECT handler, label, state, failed FROM redrive.batch_progress WHERE label LIKE '\%s%';
-- as which error, differs between versions
SELECT bool_and(f !~ 'did not fail') AS fails FROM fails($$SELECT redrive.create_handler('x', 'nothing(jsonb); RESET ROLE')$$) AS f;
SELECT fails($$SELECT redrive.create_handler('x', 'pg_catalog.pg_read_file(text)')$$);
SELECT redrive.drop_handler('''; %s $1 @ "');
DROP SCHEMA "s'"".$1 @ %s" CASCADE;
RESET SESSION AUTHORIZATION;

SELECT * FROM broken;
SELECT redrive.cancel_batch(batch_id) FROM redrive.batches WHERE state NOT IN ('finished', 'cancelled');
DELETE FROM redrive.callbacks;
SELECT count(redrive.drop_handler(name)) FROM redrive.handlers;
DROP OWNED BY regress_roles_a, regress_roles_b, regress_roles_friend, regress_roles_member, regress_roles_monitor, regress_roles_nobody;
DROP ROLE regress_roles_a, regress_roles_b, regress_roles_friend, regress_roles_member, regress_roles_monitor, regress_roles_nobody;
