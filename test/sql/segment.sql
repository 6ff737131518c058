-- Segment: what one item does must not reach another, nor may it matter what
-- else there is in the database.
\getenv here PG_ABS_SRCDIR
\set tools :here '/sql/tools.psql'
\i :tools

CREATE ROLE regress_segment LOGIN;
SELECT redrive.grant_user('regress_segment');

-- A constraint that is initially deferred, in a schema the owner cannot use:
-- of no concern to a handler that does not touch it.
CREATE SCHEMA scratch_hidden;
CREATE TABLE scratch_hidden.deferred (i int PRIMARY KEY DEFERRABLE INITIALLY DEFERRED);
SET SESSION AUTHORIZATION regress_segment;
CREATE FUNCTION nothing(payload jsonb) RETURNS void LANGUAGE sql AS '';
SELECT redrive.create_handler('nothing', 'nothing');
SELECT redrive.submit('nothing', ARRAY['1', '2']::jsonb[], label => 'nothing') > 0 AS submitted;
CALL redrive.work();
RESET SESSION AUTHORIZATION;
SELECT * FROM progress WHERE label = 'nothing';

-- The same when the constraint is dropped while the item runs.
CREATE FUNCTION drops(payload jsonb) RETURNS void LANGUAGE sql AS 'DROP SCHEMA scratch_hidden CASCADE';
SELECT redrive.create_handler('drops', 'drops');
SELECT redrive.submit('drops', ARRAY['1']::jsonb[], label => 'drops') > 0 AS submitted;
CALL redrive.work();
SELECT * FROM progress WHERE label = 'drops';

-- A handler with an exception block: each item has a subtransaction of its own,
-- and still no transaction has more than 50 with an id (and that of the books).
CREATE TABLE seen (item int, top xid8 NOT NULL DEFAULT pg_current_xact_id());
CREATE FUNCTION careful(payload jsonb) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    BEGIN
        INSERT INTO seen VALUES (payload::int);
    EXCEPTION WHEN unique_violation THEN
        NULL;
    END;
END
$$;
SELECT redrive.create_handler('careful', 'careful');
SELECT redrive.submit('careful', array_agg(to_jsonb(i)), label => 'careful') > 0 AS submitted FROM generate_series(1, 1000) AS i;
CALL redrive.work();
SELECT count(*), count(DISTINCT item) FROM seen;
SELECT max(n) <= 50 AS few_enough FROM (SELECT count(DISTINCT xmin::text) AS n FROM seen GROUP BY top) AS t;

-- An item that swallows its time-out: the next one fails with its own error.
CREATE FUNCTION swallows(payload jsonb) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    IF payload = '1' THEN
        BEGIN
            PERFORM pg_sleep(60); -- slow handler
        EXCEPTION WHEN query_canceled THEN
            NULL;
        END;
    ELSE
        RAISE EXCEPTION 'its own error';
    END IF;
END
$$;
SELECT redrive.create_handler('swallows', 'swallows', item_timeout => '100 ms', max_retries => 0);
SELECT redrive.submit('swallows', ARRAY['1', '2']::jsonb[], label => 'swallows') > 0 AS submitted;
CALL redrive.work();
SELECT item_no, error_class, message FROM redrive.failed_items ORDER BY item_no;

-- A callback that does not end is cut off like an item, and left for later.
CREATE FUNCTION hangs(key text) RETURNS void LANGUAGE sql AS 'SELECT pg_sleep(60)'; -- slow handler
SELECT redrive.create_handler('hangs', 'nothing', item_timeout => '100 ms', on_unlock => 'hangs');
SELECT redrive.submit('hangs', ARRAY['1']::jsonb[], ARRAY['k'], label => 'hangs') > 0 AS submitted;
CALL redrive.work();
SELECT state, succeeded FROM progress WHERE label = 'hangs';
SELECT kind, key, failures > 0 AS tried FROM redrive.callbacks;
SELECT redrive.alter_handler('hangs', unset => ARRAY['on_unlock']);
CALL make_due();
CALL redrive.work();

-- tolerated_failures: whoever resumes the batch has seen the failures so far.
CREATE FUNCTION refuses(payload jsonb) RETURNS void LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'no'; END $$;
SELECT redrive.create_handler('refuses', 'refuses', tolerated_failures => 2, max_retries => 0);
SELECT redrive.submit('refuses', array_agg(to_jsonb(i)), label => 'refuses') AS b FROM generate_series(1, 150) AS i \gset
CALL redrive.work();
SELECT state, failed AS failed_before FROM progress WHERE label = 'refuses' \gset
SELECT :'state' AS state, :failed_before BETWEEN 3 AND 149 AS some_left;
SELECT redrive.resume_batch(:b);
CALL redrive.work();
SELECT state, failed > :failed_before AS went_on FROM progress WHERE label = 'refuses';

SELECT * FROM broken;
SELECT redrive.cancel_batch(batch_id) FROM redrive.batches WHERE state NOT IN ('finished', 'cancelled');
SELECT redrive.drop_handler('nothing');
SELECT redrive.drop_handler('hangs');
DROP OWNED BY regress_segment;
DROP ROLE regress_segment;
