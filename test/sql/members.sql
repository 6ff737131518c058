-- Members of the extension: what each must have, and that nothing is left when
-- it is dropped.
\getenv here PG_ABS_SRCDIR
\set tools :here '/sql/tools.psql'
\i :tools

CREATE VIEW members AS
SELECT d.classid, d.objid, pg_describe_object(d.classid, d.objid, 0) AS object
FROM pg_depend AS d
WHERE d.refclassid = 'pg_extension'::regclass AND d.refobjid = (SELECT oid FROM pg_extension WHERE extname = 'pg_redrive') AND d.deptype = 'e';
SELECT count(*) > 150 AS enough FROM members;
-- All of it is in our schema, and all of our schema is ours.
SELECT object FROM members WHERE object !~ '\mredrive\.' AND object <> 'schema redrive' ORDER BY object COLLATE "C";
SELECT c.relname FROM pg_class AS c WHERE c.relnamespace = 'redrive'::regnamespace AND c.relkind NOT IN ('i', 'I', 't', 'c') AND NOT EXISTS (SELECT FROM members AS m WHERE m.classid = 'pg_class'::regclass AND m.objid = c.oid) ORDER BY 1;

-- Without a comment: none.  Columns too, of tables, views and types; not of
-- partitions, and not those of internal relations.
SELECT object FROM members
WHERE obj_description(objid, classid::regclass::name) IS NULL
  AND NOT (classid = 'pg_type'::regclass AND EXISTS (SELECT FROM pg_type AS t JOIN pg_class AS c ON c.oid = t.typrelid WHERE t.oid = objid AND c.relkind <> 'c'))
  AND NOT (classid = 'pg_type'::regclass AND EXISTS (SELECT FROM pg_type AS t WHERE t.oid = objid AND t.typcategory = 'A'))
ORDER BY object COLLATE "C";
SELECT c.relname, a.attname
FROM pg_class AS c JOIN pg_attribute AS a ON a.attrelid = c.oid
WHERE c.relnamespace = 'redrive'::regnamespace AND c.relkind IN ('r', 'v', 'p') AND NOT c.relispartition AND c.relname NOT LIKE '\_%' AND a.attnum > 0 AND NOT a.attisdropped
  AND col_description(c.oid, a.attnum) IS NULL
ORDER BY c.relname, a.attnum;

-- SECURITY DEFINER: none; what needs our rights asks who calls.
SELECT p.oid::regprocedure FROM pg_proc AS p WHERE p.pronamespace = 'redrive'::regnamespace AND p.prosecdef ORDER BY p.oid::regprocedure::text COLLATE "C";

-- Granted to PUBLIC: nothing.
SELECT 'routine' AS kind, p.oid::regprocedure::text AS object FROM pg_proc AS p WHERE p.pronamespace = 'redrive'::regnamespace AND has_function_privilege('public', p.oid, 'EXECUTE')
UNION ALL
SELECT 'relation', c.oid::regclass::text FROM pg_class AS c WHERE c.relnamespace = 'redrive'::regnamespace AND c.relkind IN ('r', 'p', 'v', 'm', 'f') AND has_table_privilege('public', c.oid, 'SELECT, INSERT, UPDATE, DELETE, TRUNCATE, REFERENCES, TRIGGER')
UNION ALL
SELECT 'sequence', c.oid::regclass::text FROM pg_class AS c WHERE c.relnamespace = 'redrive'::regnamespace AND CASE WHEN c.relkind = 'S' THEN has_sequence_privilege('public', c.oid, 'SELECT, UPDATE, USAGE') END
UNION ALL
SELECT 'column', a.attrelid::regclass || '.' || a.attname FROM pg_attribute AS a JOIN pg_class AS c ON c.oid = a.attrelid WHERE c.relnamespace = 'redrive'::regnamespace AND a.attacl IS NOT NULL
UNION ALL
SELECT 'schema', 'redrive' WHERE has_schema_privilege('public', 'redrive', 'USAGE, CREATE');

-- Views that people may read hide rows before their conditions run.
SELECT c.relname FROM pg_class AS c
WHERE c.relnamespace = 'redrive'::regnamespace AND c.relkind = 'v' AND c.relname NOT LIKE '\_%' AND NOT coalesce(c.reloptions && ARRAY['security_barrier=true', 'security_invoker=true'], false)
ORDER BY c.relname;
-- Trusted by nobody: superusers install it.  It cannot be moved.
SELECT extrelocatable, extnamespace::regnamespace FROM pg_extension WHERE extname = 'pg_redrive';
ALTER EXTENSION pg_redrive SET SCHEMA public;
-- What pg_dump keeps: every table and sequence with rows of users.
SELECT c.relname FROM pg_class AS c
WHERE c.relnamespace = 'redrive'::regnamespace AND c.relkind IN ('r', 'S') AND c.oid <> ALL (SELECT unnest(extconfig) FROM pg_extension WHERE extname = 'pg_redrive')
ORDER BY c.relname;

-- The public functions and procedures, and the views: the contract.
\pset format unaligned
SELECT p.proname || '(' || pg_get_function_arguments(p.oid) || ')' || coalesce(' -> ' || pg_get_function_result(p.oid), ' procedure') AS routine
FROM pg_proc AS p WHERE p.pronamespace = 'redrive'::regnamespace AND p.proname NOT LIKE '\_%' ORDER BY p.proname COLLATE "C";
\pset format aligned
SELECT c.relname AS view FROM pg_class AS c WHERE c.relnamespace = 'redrive'::regnamespace AND c.relkind = 'v' AND c.relname NOT LIKE '\_%' ORDER BY c.relname;

-- A schema of that name that is there already is not adopted; drop takes all
-- away, with batches or without.
SET client_min_messages = warning;
DROP SCHEMA scratch CASCADE;
RESET client_min_messages;
RESET search_path;
SELECT redrive.open_batch('none');
\echo :SQLSTATE
DROP EXTENSION pg_redrive;
SELECT count(*) FROM pg_namespace WHERE nspname = 'redrive';
SELECT (SELECT count(*) FROM pg_class WHERE relname LIKE '%redrive%') AS classes, (SELECT count(*) FROM pg_proc WHERE proname LIKE '%redrive%') AS functions, (SELECT count(*) FROM pg_type WHERE typname LIKE '%redrive%') AS types,
    (SELECT count(*) FROM pg_event_trigger) AS event_triggers;
CREATE SCHEMA redrive;
\set SHOW_CONTEXT never
CREATE EXTENSION pg_redrive;
\set SHOW_CONTEXT errors
\echo :SQLSTATE
DROP SCHEMA redrive;
CREATE EXTENSION pg_redrive;
SELECT count(*) FROM redrive.batch_progress;
-- With work in it, and twice in a row.
CREATE FUNCTION do_nothing(payload jsonb) RETURNS void LANGUAGE sql AS '';
SELECT redrive.create_handler('h', 'do_nothing');
SELECT redrive.send('h', '1') AS first;
CALL redrive.work();
SELECT state FROM redrive.batch_progress;
DROP EXTENSION pg_redrive;
CREATE EXTENSION pg_redrive;
SELECT redrive.create_handler('h', 'do_nothing');
SELECT redrive.send('h', '1') AS first_again;
CALL redrive.work();
SELECT state FROM redrive.batch_progress;
SELECT redrive.drop_handler('h');
DROP FUNCTION do_nothing;
