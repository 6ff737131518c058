-- Types.  Every state is spelled the same here, in C, in the docs and in the log.

CREATE TYPE redrive.handler_kind AS ENUM ('row', 'set', 'external');
COMMENT ON TYPE redrive.handler_kind IS 'How a handler gets its items: row = one item per call, set = an array of items per call, external = claimed by applications';

CREATE TYPE redrive.handler_signature AS ENUM ('payload', 'key_payload', 'item', 'items');
COMMENT ON TYPE redrive.handler_signature IS 'Arguments of a handler''s function: payload = (jsonb), key_payload = (text, jsonb), item = (redrive.item), items = (redrive.item[])';

CREATE TYPE redrive.isolation_mode AS ENUM ('chunk', 'item');
COMMENT ON TYPE redrive.isolation_mode IS 'chunk = many items per transaction, a good item may be rolled back and run again; item = one transaction per item, each item runs once';

CREATE TYPE redrive.batch_state AS ENUM ('open', 'ready', 'running', 'paused', 'retrying', 'finished', 'cancelled');
COMMENT ON TYPE redrive.batch_state IS 'open -> ready -> running -> retrying -> finished; paused from ready, running or retrying and back; cancelled from any live state; finished -> running by redrive';

CREATE TYPE redrive.chunk_kind AS ENUM ('first', 'retry');
COMMENT ON TYPE redrive.chunk_kind IS 'first = a contiguous range of items that were never attempted, retry = a list of items that failed before';

CREATE TYPE redrive.chunk_state AS ENUM ('running', 'done', 'orphaned');
COMMENT ON TYPE redrive.chunk_state IS 'running -> done or orphaned; orphaned -> running with a new lease token, or done when its batch is cancelled';

CREATE TYPE redrive.failure_state AS ENUM ('waiting', 'failed', 'ignored', 'cancelled');
COMMENT ON TYPE redrive.failure_state IS 'State of an item whose last attempt failed';

CREATE TYPE redrive.fail_reason AS ENUM ('exhausted', 'non_retryable', 'quarantined', 'expired');
COMMENT ON TYPE redrive.fail_reason IS 'Why a failed item is not retried: budget used up, error class says so, crashed the server, waited longer than retry_window';

CREATE TYPE redrive.rule_action AS ENUM ('ignore', 'fail', 'retry', 'retry_free', 'pause');
COMMENT ON TYPE redrive.rule_action IS 'ignore = not run again, counted as ignored; fail = final; retry = costs a retry; retry_free = does not, capped apart; pause = stop the batch, the item stays waiting';

CREATE TYPE redrive.item AS (batch_id bigint, item_no bigint, key text, payload jsonb, attempt int);
COMMENT ON TYPE redrive.item IS 'One item as a handler sees it; attempt counts from 1';

CREATE TYPE redrive.outcome_kind AS ENUM ('ok', 'ignored', 'failed', 'retry', 'snoozed');
COMMENT ON TYPE redrive.outcome_kind IS 'What became of an item: ok; ignored = not run again, counted as ignored; failed = final; retry = again, at the cost of a retry; snoozed = again later, at no cost';

CREATE TYPE redrive.outcome AS (item_no bigint, outcome redrive.outcome_kind, message text, code text, delay interval);
COMMENT ON TYPE redrive.outcome IS 'What a set handler or an external worker says about one item; code is an SQLSTATE or a code of the application, delay is for retry and snoozed';

CREATE TYPE redrive.pass_result AS (
    pass text,
    outcome text,
    acted bigint,
    more boolean,
    detail text
);
COMMENT ON TYPE redrive.pass_result IS 'What a pass did: outcome is done, already running or disabled; acted counts rows changed; more = call again, work is left; detail names the parts';
