-- What a newcomer gets wrong: each mistake ends in an error, a notice or a row of why() that says what to do.
-- Fails if a hint goes away.  What PostgreSQL itself refuses, for want of a grant or of a cast, is explained in docs/operations.md.
\getenv here PG_ABS_SRCDIR
\set tools :here '/sql/tools.psql'
\i :tools

CREATE ROLE regress_new LOGIN;
CREATE ROLE regress_other LOGIN;
SELECT redrive.grant_user('regress_new'), redrive.grant_user('regress_other');
CREATE FUNCTION secret(payload jsonb) RETURNS void LANGUAGE sql AS '';
REVOKE ALL ON FUNCTION secret(jsonb) FROM PUBLIC;
SET SESSION AUTHORIZATION regress_new;
CREATE FUNCTION good(payload jsonb) RETURNS void LANGUAGE sql AS '';
CREATE FUNCTION counts(n int) RETURNS void LANGUAGE sql AS '';
CREATE FUNCTION two(payload jsonb, more int) RETURNS void LANGUAGE sql AS '';
CREATE FUNCTION as_json(payload json) RETURNS void LANGUAGE sql AS '';
CREATE PROCEDURE proc(payload jsonb) LANGUAGE sql AS '';
SELECT redrive.create_handler('good', 'good');
SELECT f FROM (VALUES
    ($$SELECT redrive.create_handler('x', 'nosuch')$$),
    ($$SELECT redrive.create_handler('x', 'counts')$$),
    ($$SELECT redrive.create_handler('x', 'two')$$),
    ($$SELECT redrive.create_handler('x', 'as_json')$$),
    ($$SELECT redrive.create_handler('x', 'proc')$$),
    ($$SELECT redrive.create_handler('x', 'good()')$$),
    ($$SELECT redrive.create_handler('x', 'good(jsonb)')$$),
    ($$SELECT redrive.create_handler('x', 'secret')$$),
    ($$SELECT redrive.create_handler('x')$$),
    ($$SELECT redrive.create_handler('good', 'good')$$),
    ($$SELECT redrive.create_handler('x', 'good', kind => 'set')$$),
    ($$SELECT redrive.submit('goood', ARRAY['{}']::jsonb[])$$),
    ($$SELECT redrive.submit('good', NULL)$$),
    ($$SELECT redrive.submit('good', ARRAY[NULL]::jsonb[])$$),
    ($$SELECT redrive.submit('good', '{}')$$),
    ($$SELECT redrive.submit('good', ARRAY['{}']::jsonb[], keys => ARRAY['a', 'b'])$$),
    ($$SELECT redrive.submit('good', ARRAY['{}', '{}']::jsonb[], keys => ARRAY['a', 'a'])$$),
    ($$SELECT redrive.send('good', NULL)$$),
    ($$SELECT redrive.submit_query('good', 'SELECT 1')$$),
    ($$SELECT redrive.submit_query('good', 'SELECT 1, 2')$$),
    ($$SELECT redrive.submit_query('good', 'DELETE FROM nosuch')$$),
    ($$SELECT redrive.add_items(0, ARRAY['{}']::jsonb[])$$),
    ($$SELECT redrive.seal_batch(0)$$),
    ($$SELECT redrive.redrive(0)$$),
    ($$SELECT * FROM redrive.why(0)$$),
    ($$SELECT * FROM redrive.claim('good')$$),
    ($$SELECT * FROM redrive.doctor()$$),
    ($$SELECT redrive.rescue_stale()$$),
    ($$SELECT redrive.schedule_passes()$$),
    ($$SELECT redrive.alter_handler('good', max_retries => -1)$$)
) AS x (s) CROSS JOIN LATERAL fails(x.s) AS f;
-- Words of PostgreSQL, which docs/operations.md has.
SELECT f FROM (VALUES ($$SELECT redrive.submit('good', '{"a": 1}')$$), ($$SELECT redrive.submit('good', ARRAY['{"a": 1}'])$$)) AS x (s) CROSS JOIN LATERAL (SELECT f FROM fails(x.s) AS f LIMIT 1) AS f;

-- In somebody else's place.
SET SESSION AUTHORIZATION regress_other;
SELECT f FROM (VALUES ($$SELECT redrive.submit('good', ARRAY['{}']::jsonb[])$$), ($$SELECT redrive.pause_handler('good')$$)) AS x (s) CROSS JOIN LATERAL fails(x.s) AS f;
CALL redrive.work();
SET SESSION AUTHORIZATION regress_new;

-- Batches that do not move.
SELECT redrive.open_batch('good', label => 'open') AS b \gset
SELECT redrive.add_items(:b, ARRAY['{}']::jsonb[]);
SELECT fact, regexp_replace(detail, 'at \d.*, and', 'at TIME, and') AS detail, remedy FROM redrive.why(:b);
CALL redrive.wait(:b, '10 ms');
SELECT redrive.submit('good', ARRAY['{}']::jsonb[], label => 'no workers') AS n \gset
CALL redrive.wait(:n, '10 ms');
SELECT fact, detail, remedy FROM redrive.why(:n);
BEGIN;
SELECT redrive.submit('good', ARRAY['{}']::jsonb[], label => 'uncommitted') AS u \gset
CALL redrive.wait(:u, '10 ms');
ROLLBACK;
BEGIN READ ONLY;
SELECT fails($$SELECT redrive.submit('good', ARRAY['{}']::jsonb[])$$);
CALL redrive.work();
ROLLBACK;
REVOKE EXECUTE ON FUNCTION good(jsonb) FROM PUBLIC, regress_new;
CALL redrive.work();
SELECT fact, detail, remedy FROM redrive.why(:n);
RESET SESSION AUTHORIZATION;

SELECT redrive.cancel_batch(b) FROM unnest(ARRAY[:b, :n]::bigint[]) AS b;
SELECT redrive.drop_handler('good');
SELECT redrive.revoke_user('regress_new'), redrive.revoke_user('regress_other');
DROP OWNED BY regress_new, regress_other;
DROP ROLE regress_new, regress_other;
DROP FUNCTION secret(jsonb);
