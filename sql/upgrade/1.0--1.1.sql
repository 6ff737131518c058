-- What scripts/upgrade-script cannot derive: changes of types, tables and indexes, rows that come with the extension, and functions
-- and views that are dropped, or of which the result or the arguments change (DROP them here; they are made anew below).

CREATE INDEX pushes_given_up_idx ON redrive.pushes (platform_id) WHERE state IN ('dead', 'blocked');
ALTER TABLE redrive.platforms ADD COLUMN planned_at timestamptz, DROP COLUMN needs_plan;
DROP FUNCTION redrive._plan_platform(int, timestamptz), redrive._truncate_part(int);
CREATE INDEX tasks_changed_idx ON redrive.tasks (changed_at);
DROP INDEX redrive.pushes_due_idx, redrive.pushes_build_idx;
CREATE INDEX pushes_due_idx ON redrive.pushes (platform_id, awaits_build, next_attempt_at) WHERE state IN ('pending', 'waiting');
DROP INDEX redrive.batches_retry_idx;
CREATE INDEX batches_retry_idx ON redrive.batches (handler_id, next_retry_at) WHERE next_retry_at IS NOT NULL AND state IN ('running', 'retrying');
CREATE INDEX batches_retry_priority_idx ON redrive.batches (handler_id, priority DESC, next_retry_at) WHERE next_retry_at IS NOT NULL AND state IN ('running', 'retrying');
DROP INDEX redrive.chunks_finished_idx;
CREATE INDEX chunks_finished_idx ON redrive.chunks (finished_at) WHERE finished_at IS NOT NULL;
-- out of what is dumped, too
ALTER EXTENSION pg_redrive DROP SEQUENCE redrive.lease_tokens;
DROP SEQUENCE redrive.lease_tokens;
DROP FUNCTION redrive._claim_external(oid, text, int, interval, text);
DROP FUNCTION redrive._lock_soon(bigint);
DROP FUNCTION redrive._take_work(redrive.handlers, bigint, interval, text);
-- a push that is under way is in push_claims now; what a pusher of before has claimed is given to the next one to end
CREATE TABLE redrive.push_claims (
    claim_id bigint GENERATED ALWAYS AS IDENTITY,
    platform_id int NOT NULL,
    pusher bigint NOT NULL,
    is_probe boolean NOT NULL,
    claimed_at timestamptz NOT NULL,
    lease_until timestamptz NOT NULL,
    push_ids bigint[] NOT NULL,
    versions bigint[] NOT NULL,
    CONSTRAINT push_claims_pkey PRIMARY KEY (claim_id),
    CONSTRAINT push_claims_check CHECK (cardinality(push_ids) = cardinality(versions))
);
INSERT INTO redrive.push_claims (platform_id, pusher, is_probe, claimed_at, lease_until, push_ids, versions)
SELECT u.platform_id, u.lease_owner, u.is_probe, now(), min(u.lease_until), array_agg(u.push_id), array_agg(u.sent_version)
FROM redrive.pushes AS u
WHERE u.state = 'in_flight'
GROUP BY u.platform_id, u.lease_owner, u.is_probe;
-- it reads columns that go; it is not dropped, since views of users may read it, and rights on it stay
CREATE OR REPLACE VIEW redrive.push_status AS
SELECT NULL::text AS task_key, NULL::text AS platform, NULL::redrive.push_state AS state, NULL::text AS wanted_status, NULL::text AS pushed_status,
    NULL::int AS retry_count, NULL::timestamptz AS next_attempt_at, NULL::timestamptz AS failed_at, NULL::int AS http_status, NULL::text AS message,
    NULL::text AS error_class, NULL::bigint AS wanted_version, NULL::bigint AS pushed_version, NULL::bigint AS attempts,
    NULL::timestamptz AS delivered_at, NULL::timestamptz AS lease_until;
DROP INDEX redrive.pushes_lease_idx;
ALTER TABLE redrive.pushes
    DROP CONSTRAINT pushes_lease_check;
UPDATE redrive.pushes SET state = 'pending', attempt_no = attempt_no - 1 WHERE state = 'in_flight';
ALTER TABLE redrive.pushes
    DROP COLUMN lease_until,
    DROP COLUMN lease_owner,
    DROP COLUMN sent_version,
    DROP COLUMN is_probe,
    ADD COLUMN last_claim_id bigint NOT NULL DEFAULT 0,
    ADD CONSTRAINT pushes_state_check CHECK (state <> 'in_flight');
DROP FUNCTION redrive._report_table(text, text);
DROP FUNCTION redrive._split(redrive.chunks, bigint);
-- a pass adds them to times, and for all roles at once
DO $$
DECLARE
    c text;
    v_mixed text;
BEGIN
    FOREACH c IN ARRAY ARRAY['stale_after', 'start_timeout', 'retry_window'] LOOP
        v_mixed := format('least(extract(year FROM %1$I), extract(day FROM %1$I), extract(hour FROM %1$I))', c);
        EXECUTE format('UPDATE redrive.handlers SET %1$I = CASE WHEN %1$I > ''100 years'' THEN ''100 years'' ELSE justify_interval(%1$I) END WHERE %1$I > ''100 years'' OR %2$s < 0', c, v_mixed);
        EXECUTE format('ALTER TABLE redrive.handlers DROP CONSTRAINT handlers_%1$s_check, ADD CONSTRAINT handlers_%1$s_check CHECK (%1$I > interval ''0'' AND %1$I <= interval ''100 years'' AND %2$s >= 0)', c, v_mixed);
    END LOOP;
END
$$;
UPDATE redrive.batches
SET run_at = now() + interval '10000 years', serve_after = least(serve_after, now() + interval '10000 years')
WHERE run_at > now() + interval '10000 years';
