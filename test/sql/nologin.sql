-- A handler whose owner may not log in.  Before PostgreSQL 17 workers cannot
-- connect as that role (nologin.out), since then they can (nologin_1.out).
\getenv here PG_ABS_SRCDIR
\set tools :here '/sql/tools.psql'
\i :tools

SELECT current_setting('server_version_num')::int < 170000 AS needs_login;
CREATE ROLE regress_nologin_a LOGIN;
CREATE ROLE regress_nologin_b NOLOGIN;
SELECT redrive.grant_user('regress_nologin_a');
SELECT redrive.grant_user('regress_nologin_b');
CREATE FUNCTION take(payload jsonb) RETURNS void LANGUAGE sql AS '';
CREATE FUNCTION ended(batch_id bigint, run_no int) RETURNS void LANGUAGE sql AS '';

-- Not to be made.
SET SESSION AUTHORIZATION regress_nologin_b;
SELECT fails($$SELECT redrive.create_handler('of b', 'take')$$);
-- Work outside the database needs no worker of ours, a callback does.
SELECT redrive.create_handler('outside', kind => 'external');
SELECT fails($$SELECT redrive.create_handler('outside with an end', kind => 'external', on_finish => 'ended')$$);

-- Was made before: who asks gets to know, the owner as well.
SET SESSION AUTHORIZATION regress_nologin_a;
SELECT redrive.create_handler('of a', 'take');
SELECT redrive.submit('of a', ARRAY['1']::jsonb[], label => 'of a') > 0 AS submitted;
CREATE FUNCTION body(task redrive.task) RETURNS jsonb LANGUAGE sql AS $$ SELECT '1'::jsonb $$;
BEGIN;
SELECT redrive.create_platform('p of a', 'https://crm.example/', build => 'body'), redrive.pause_platform('p of a');
COMMIT;
RESET SESSION AUTHORIZATION;
ALTER ROLE regress_nologin_a NOLOGIN;
SET SESSION AUTHORIZATION regress_nologin_a;
SELECT fact, detail, remedy FROM redrive.why(batch('of a')) WHERE fact ~ 'owner';
RESET SESSION AUTHORIZATION;
SELECT severity, finding, remedy FROM redrive.doctor() WHERE finding ~ 'of a"';

-- The owner can do the work in a session.
SET SESSION AUTHORIZATION regress_nologin_a;
CALL redrive.work();
RESET SESSION AUTHORIZATION;
SELECT * FROM progress;

SELECT redrive.revoke_user(r) FROM unnest(ARRAY['regress_nologin_a', 'regress_nologin_b']::name[]) AS r;
SELECT redrive.drop_handler(name) FROM redrive.handlers ORDER BY name;
SELECT redrive.drop_platform('p of a');
DROP OWNED BY regress_nologin_a, regress_nologin_b;
DROP ROLE regress_nologin_a, regress_nologin_b;
SET client_min_messages = warning;
DROP SCHEMA scratch CASCADE;
