-- The table and the handler for a worker under test; then start the worker, and
-- run check.sql.  What a worker has to do is told in docs/workers.md.
--
--   psql -X -v ON_ERROR_STOP=1 -f setup.sql      as the role the worker has: it needs redrive.grant_user()
--   (start the worker for handler "conformance")
--   psql -X -v ON_ERROR_STOP=1 -f check.sql      as a superuser
--   psql -X -c 'DROP SCHEMA conformance CASCADE' -c "SELECT redrive.drop_handler('conformance')"
--
-- The worker's job: for each item with payload {"n": <integer>} insert one row into
-- conformance.done, the result being n * n, in the transaction of settle() or
-- complete().  An item without such an n, be it text, true, a fraction, or a payload
-- that is no object: "failed", code E-INPUT.  An insert
-- that the database refuses: "ignored" for SQLSTATE RD001, "failed" for classes 22
-- and 23, "retry" for any other; with message and SQLSTATE as they are.
CREATE SCHEMA conformance;

CREATE TABLE conformance.done (
    batch_id bigint NOT NULL,
    item_no bigint NOT NULL,
    attempt int NOT NULL,
    result bigint NOT NULL CHECK (result >= 0)
);

-- Makes some results fail, or wait: 100 .. 199 squared are ignored, 200 .. 299
-- refused at the first attempt, 300 .. 399 always, and 400 .. 499 violate the
-- CHECK.  5000 waits until check.sql says so.
CREATE FUNCTION conformance.examine() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    n int := sqrt(NEW.result);
BEGIN
    CASE
        WHEN n BETWEEN 100 AND 199 THEN
            PERFORM redrive.raise_validation(format('%s is of no use', n));
        WHEN n BETWEEN 200 AND 299 AND NEW.attempt = 1 OR n BETWEEN 300 AND 399 THEN
            RAISE EXCEPTION '% is not possible now', n USING ERRCODE = 'CF001';
        WHEN n BETWEEN 400 AND 499 THEN
            NEW.result := -1;
        WHEN n = 5000 THEN
            PERFORM pg_advisory_xact_lock_shared(5000);
        ELSE
            NULL;
    END CASE;
    RETURN NEW;
END
$$;
CREATE TRIGGER examine BEFORE INSERT ON conformance.done FOR EACH ROW EXECUTE FUNCTION conformance.examine();

SELECT redrive.create_handler('conformance', kind => 'external', max_retries => 2, retry_delay => '100 ms', retry_factor => 1);
