-- Attempts to push are purged by their own age, part by part, with batches beside
-- them or without.
\getenv here PG_ABS_SRCDIR
\set tools :here '/sql/tools.psql'
\i :tools

-- Attempts are kept as long as the retention says, also where there are no batches.
SELECT now() AS t \gset
UPDATE redrive.rotation SET part = 0, rotated_at = :'t', retention = '30 days';
CREATE PROCEDURE log_attempt(at timestamptz) LANGUAGE sql AS $$
    INSERT INTO redrive.push_log (part, push_id, attempt_no, platform_id, version, started_at, finished_at, delivered, charged, is_probe)
    SELECT r.part, u.push_id, 1, 1, 1, at, at, true, true, false FROM redrive.rotation AS r, generate_series(1, 3) AS u (push_id)
$$;
CREATE FUNCTION purged(as_of timestamptz) RETURNS TABLE (detail text, part int, attempts bigint) LANGUAGE plpgsql AS $$
BEGIN
    detail := (redrive.purge(as_of)).detail;
    SELECT r.part, (SELECT count(*) FROM redrive.push_log) INTO part, attempts FROM redrive.rotation AS r;
    RETURN NEXT;
END
$$;
CALL log_attempt(:'t'::timestamptz + interval '5 days');
SELECT * FROM purged(:'t'::timestamptz + interval '5 days 1 s');
SELECT * FROM purged(:'t'::timestamptz + interval '5 days 1 h');
CALL log_attempt(:'t'::timestamptz + interval '6 days');
SELECT * FROM purged(:'t'::timestamptz + interval '11 days');
SELECT * FROM purged(:'t'::timestamptz + interval '34 days 23 h');
SELECT * FROM purged(:'t'::timestamptz + interval '35 days 1 h');
SELECT * FROM purged(:'t'::timestamptz + interval '36 days 1 h');
-- Batches that are old stay as long as attempts of their part that are not.
CREATE FUNCTION take(payload jsonb) RETURNS void LANGUAGE sql AS '';
SELECT redrive.create_handler('h', 'take');
UPDATE redrive.rotation SET part = 0, rotated_at = :'t';
SELECT redrive.submit('h', ARRAY['1']::jsonb[]) > 0 AS submitted;
CALL redrive.work();
UPDATE redrive.batches SET finished_at = :'t';
CALL log_attempt(:'t'::timestamptz + interval '5 days');
SELECT * FROM purged(:'t'::timestamptz + interval '6 days');
SELECT * FROM purged(:'t'::timestamptz + interval '34 days');
SELECT * FROM purged(:'t'::timestamptz + interval '36 days');
SELECT redrive.drop_handler('h');
UPDATE redrive.rotation SET part = 0, rotated_at = now();

