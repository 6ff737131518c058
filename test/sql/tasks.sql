-- Tables as sources of tasks: those that change after they were attached, partitions
-- and children, and what cannot be a source.  The tasks are in platforms.sql.
\getenv here PG_ABS_SRCDIR
\set tools :here '/sql/tools.psql'
\i :tools
\pset format unaligned
\pset tuples_only on

CREATE VIEW tasks AS SELECT task_key, status, version, is_test, payload FROM redrive.task_status ORDER BY task_key;

-- Lists of columns.
CREATE TABLE forms (no int, state text, trial boolean, amount numeric, note text);
SELECT f FROM unnest(ARRAY['{}', '{amount, NULL}', '{none}', '{{amount}, {none}}']) AS c CROSS JOIN LATERAL fails(format('SELECT redrive.attach_task_source(''forms'', ''no'', ''state'', payload_columns => %L)', c)) AS f;
SELECT redrive.attach_task_source('forms', 'no', 'state', 'trial', '[5:6][0:0]={{amount}, {note}}');
INSERT INTO forms VALUES (1, 'new', false, 10, 'n');
SELECT * FROM tasks;

-- A column that is gone: nothing is written, and it is said what helps.
SELECT f FROM unnest(ARRAY['RENAME no TO number', 'RENAME state TO status', 'RENAME trial TO test', 'DROP amount', 'ALTER trial TYPE int USING 0']) AS c
CROSS JOIN LATERAL fails(format('DO $x$ BEGIN ALTER TABLE forms %s; INSERT INTO forms DEFAULT VALUES; END $x$', c)) AS f;
SELECT count(*) FROM forms;
-- Other names of the table, other types and columns that are not asked for do no harm.
ALTER TABLE forms RENAME TO "The forms";
ALTER TABLE "The forms" ADD x int, ALTER no TYPE text, ALTER state TYPE int USING 7;
UPDATE "The forms" SET state = 8;
SELECT * FROM tasks;
-- The triggers have other names by now.
ALTER TRIGGER redrive_task_source_insert ON "The forms" RENAME TO inserted;
ALTER TRIGGER redrive_task_source_update ON "The forms" RENAME TO "is updated";
SELECT redrive.attach_task_source('"The forms"', 'no', 'state');
SELECT redrive.detach_task_source('"The forms"');
SELECT count(*) FROM pg_trigger WHERE tgrelid = '"The forms"'::regclass;

-- Generated columns and temporary tables.
CREATE TEMPORARY TABLE made (no int, key text GENERATED ALWAYS AS ('made ' || no) STORED, state text GENERATED ALWAYS AS (CASE WHEN no > 1 THEN 'many' ELSE 'one' END) STORED);
SELECT redrive.attach_task_source('made', 'key', 'state');
INSERT INTO made VALUES (1), (2);
UPDATE made SET no = 3 WHERE no = 1;
SELECT * FROM tasks WHERE task_key ~ 'made';
DROP TABLE made;

-- Partitions and children: a statement is recorded by the table that it names.
CREATE TABLE parent (no int, state text) PARTITION BY LIST (no);
CREATE TABLE part PARTITION OF parent FOR VALUES IN (101, 102, 103);
SELECT fails($$SELECT redrive.attach_task_source('part', 'no', 'state')$$);
SELECT redrive.attach_task_source('parent', 'no', 'state');
INSERT INTO parent VALUES (101, 'by the parent');
INSERT INTO part VALUES (102, 'by itself');
SELECT * FROM tasks WHERE task_key ~ '^10';
SELECT redrive.attach_task_source('part', 'no', 'state');
INSERT INTO part VALUES (103, 'by itself');
UPDATE parent SET state = 'by the parent';
SELECT * FROM tasks WHERE task_key ~ '^10';
CREATE TABLE mother (no int, state text);
CREATE TABLE child () INHERITS (mother);
SELECT fails($$SELECT redrive.attach_task_source('child', 'no', 'state')$$);
SELECT redrive.attach_task_source('mother', 'no', 'state');
SELECT redrive.attach_task_source('child', 'no', 'state');
INSERT INTO child VALUES (201, 'by itself');
UPDATE mother SET state = 'by the mother';
SELECT * FROM tasks WHERE task_key ~ '^20';

-- What is no table.
CREATE VIEW looks AS SELECT * FROM mother;
SELECT fails($$SELECT redrive.attach_task_source('looks', 'no', 'state')$$);
SELECT fails($$SELECT redrive.attach_task_source(1::regclass, 'no', 'state')$$);
