-- What scripts/upgrade-script cannot derive: changes of types, tables and indexes, rows that come with the extension, and functions
-- and views that are dropped, or of which the result or the arguments change (DROP them here; they are made anew below).

CREATE INDEX pushes_given_up_idx ON redrive.pushes (platform_id) WHERE state IN ('dead', 'blocked');
ALTER TABLE redrive.platforms ADD COLUMN planned_at timestamptz;
DROP FUNCTION redrive._plan_platform(int, timestamptz);
DROP INDEX redrive.pushes_due_idx, redrive.pushes_build_idx;
CREATE INDEX pushes_due_idx ON redrive.pushes (platform_id, awaits_build, next_attempt_at) WHERE state IN ('pending', 'waiting');
DROP INDEX redrive.chunks_finished_idx;
CREATE INDEX chunks_finished_idx ON redrive.chunks (finished_at) WHERE finished_at IS NOT NULL;
-- out of what is dumped, too
ALTER EXTENSION pg_redrive DROP SEQUENCE redrive.lease_tokens;
DROP SEQUENCE redrive.lease_tokens;
DROP FUNCTION redrive._claim_external(oid, text, int, interval, text);
DROP FUNCTION redrive._lock_soon(bigint);
DROP FUNCTION redrive._take_work(redrive.handlers, bigint, interval, text);
DROP FUNCTION redrive._split(redrive.chunks, bigint);
