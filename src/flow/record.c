/*-------------------------------------------------------------------------
 *
 * record.c
 *	  Write down what a commit interval did, in its own transaction.
 *
 * Failures, lock releases, the chunk's counters and its watermark commit with
 * the handlers' effects.  The fence comes last: if the chunk is no longer ours
 * everything rolls back.  Rows are locked batch first, then chunk.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "catalog/pg_type.h"
#include "miscadmin.h"
#include "utils/array.h"
#include "utils/builtins.h"
#include "utils/timestamp.h"

#include "base/spi_call.h"
#include "base/wake.h"
#include "flow/handler.h"
#include "flow/record.h"
#include "flow/segment.h"

/* Columns of a failure that are passed as arrays, one element per failure. */
enum
{
	F_ITEM_NO, F_STATE, F_REASON, F_RULE_ID, F_CLASS, F_SQLSTATE, F_FINGERPRINT, F_RETRY_COUNT, F_FREE_COUNT,
	F_ATTEMPTS, F_FAILED_AT, F_NEXT_AT, F_KEY, F_MESSAGE, F_DETAIL, F_HINT, F_CONTEXT, F_CONSTRAINT, F_COLUMNS
};

static const Oid failure_types[F_COLUMNS] = {
	INT8OID, TEXTOID, TEXTOID, INT4OID, TEXTOID, TEXTOID, TEXTOID, INT4OID, INT4OID,
	INT4OID, TIMESTAMPTZOID, TIMESTAMPTZOID, TEXTOID, TEXTOID, TEXTOID, TEXTOID, TEXTOID, TEXTOID
};

#define FAILURE_ARRAYS \
	INT8ARRAYOID, TEXTARRAYOID, TEXTARRAYOID, INT4ARRAYOID, TEXTARRAYOID, TEXTARRAYOID, TEXTARRAYOID, INT4ARRAYOID, INT4ARRAYOID, \
	INT4ARRAYOID, TIMESTAMPTZARRAYOID, TIMESTAMPTZARRAYOID, TEXTARRAYOID, TEXTARRAYOID, TEXTARRAYOID, TEXTARRAYOID, TEXTARRAYOID, TEXTARRAYOID

#define FAILURE_UNNEST \
	" unnest($5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17, $18, $19, $20, $21, $22)" \
	" AS v (item_no, state, reason, rule_id, error_class, sqlstate, fingerprint, retry_count, free_count," \
	" attempts, failed_at, next_attempt_at, key, message, detail, hint, context, constraint_name)"

static RedrivePartSql insert_failures =
{
	"INSERT INTO redrive.failures_@ (part, batch_id, item_no, handler_id, run_no, state, reason, rule_id, error_class,"
	" sqlstate, fingerprint, retry_count, free_count, attempts, first_failed_at, last_failed_at, next_attempt_at,"
	" key, message, detail, hint, context, constraint_name)"
	" SELECT $1, $2, v.item_no, $3, $4, v.state::redrive.failure_state, v.reason::redrive.fail_reason, v.rule_id, v.error_class,"
	" v.sqlstate, v.fingerprint, v.retry_count, v.free_count, v.attempts, v.failed_at, v.failed_at, v.next_attempt_at,"
	" v.key, v.message, v.detail, v.hint, v.context, v.constraint_name"
	" FROM" FAILURE_UNNEST,
	4 + F_COLUMNS,
	{
		INT2OID, INT8OID, INT4OID, INT4OID, FAILURE_ARRAYS
	}
};

/* The attempt that the failures row tells of goes to the log. */
static RedrivePartSql log_superseded =
{
	"INSERT INTO redrive.failure_log_@ (part, batch_id, item_no, attempt, run_no, failed_at, error_class, sqlstate,"
	" fingerprint, message, detail, hint, context, constraint_name)"
	" SELECT f.part, f.batch_id, f.item_no, f.attempts, f.run_no, f.last_failed_at, f.error_class, f.sqlstate,"
	" f.fingerprint, f.message, f.detail, f.hint, f.context, f.constraint_name"
	" FROM redrive.failures_@ AS f WHERE f.part = $1 AND f.batch_id = $2 AND f.item_no = ANY ($3)",
	3,
	{
		INT2OID, INT8OID, INT8ARRAYOID
	}
};

/* chunk_id says that it is running: by state the index of running ones would be scanned, row by row. */
static RedrivePartSql update_failures =
{
	"UPDATE redrive.failures_@ AS f SET state = v.state::redrive.failure_state, reason = v.reason::redrive.fail_reason,"
	" rule_id = v.rule_id, error_class = v.error_class, sqlstate = v.sqlstate, fingerprint = v.fingerprint,"
	" retry_count = v.retry_count, free_count = v.free_count, attempts = v.attempts, last_failed_at = v.failed_at,"
	" next_attempt_at = v.next_attempt_at, message = v.message, detail = v.detail, hint = v.hint, context = v.context,"
	" constraint_name = v.constraint_name, chunk_id = NULL, run_no = $4"
	" FROM" FAILURE_UNNEST
	" WHERE f.part = $1 AND f.batch_id = $2 AND f.handler_id = $3 AND f.item_no = ANY ($5)"
	" AND f.item_no = v.item_no AND f.chunk_id IS NOT NULL",
	4 + F_COLUMNS,
	{
		INT2OID, INT8OID, INT4OID, INT4OID, FAILURE_ARRAYS
	}
};

static RedrivePartSql recover_failures =
{
	"UPDATE redrive.failures_@ SET state = 'recovered', attempts = attempts + 1, chunk_id = NULL"
	" WHERE part = $1 AND batch_id = $2 AND item_no = ANY ($3) AND chunk_id IS NOT NULL",
	3,
	{
		INT2OID, INT8OID, INT8ARRAYOID
	}
};

static RedriveSql release_locks = {
	"DELETE FROM redrive.locks WHERE handler_id = $1 AND key = ANY ($2) AND batch_id = $3",
	3, {INT4OID, TEXTARRAYOID, INT8OID}
};

static RedriveSql later_unlocks = {
	"INSERT INTO redrive.callbacks (handler_id, batch_id, kind, key, run_no, message, next_attempt_at)"
	" SELECT $1, $3, 'on_unlock', k, $4, $5, clock_timestamp() FROM unnest($2) AS k",
	5, {INT4OID, TEXTARRAYOID, INT8OID, INT4OID, TEXTOID}
};

/* Only when something changes, so that intervals rarely touch the batch. */
static RedriveSql note_waiting = {
	"UPDATE redrive.batches SET next_retry_at = least(next_retry_at, $2), oldest_failure_at = least(oldest_failure_at, $3)"
	" WHERE batch_id = $1 AND (next_retry_at > $2 OR (next_retry_at IS NULL AND $2 IS NOT NULL)"
	" OR oldest_failure_at > $3 OR oldest_failure_at IS NULL)",
	3, {INT8OID, TIMESTAMPTZOID, TIMESTAMPTZOID}
};

static RedriveSql pause_batch = {
	"UPDATE redrive.batches SET state = 'paused', pause_reason = $2"
	" WHERE batch_id = $1 AND state IN ('ready', 'running', 'retrying')",
	2, {INT8OID, TEXTOID}
};

static RedriveSql fence = {
	"UPDATE redrive.chunks AS c SET done_to = $3, done = done + $4, succeeded = succeeded + $5, ignored = ignored + $6,"
	" failed = failed + $7, waiting = waiting + $8, progress_at = clock_timestamp(),"
	" state = CASE WHEN $9 THEN 'done'::redrive.chunk_state ELSE state END,"
	" finished_at = CASE WHEN $9 THEN clock_timestamp() END,"
	" lease_token = CASE WHEN NOT $9 THEN lease_token END,"
	" worker_pid = CASE WHEN NOT $9 THEN worker_pid END"
	" WHERE c.chunk_id = $1 AND c.state = 'running' AND c.lease_token = $2"
	" RETURNING (SELECT b.state IN ('running', 'retrying') FROM redrive.batches AS b WHERE b.batch_id = c.batch_id) AS live",
	9, {INT8OID, INT8OID, INT8OID, INT8OID, INT8OID, INT8OID, INT8OID, INT8OID, BOOLOID}
};

/* Build an array with NULLs. */
static Datum
make_array(Oid type, int n, Datum *elements, bool *nulls)
{
	int			dims[1] = {n};
	int			lbs[1] = {1};

	if (n == 0)
		return PointerGetDatum(construct_empty_array(type));
	if (type == INT4OID)
		return PointerGetDatum(construct_md_array(elements, nulls, 1, dims, lbs, type, 4, true, TYPALIGN_INT));
	if (type == TEXTOID)
		return PointerGetDatum(construct_md_array(elements, nulls, 1, dims, lbs, type, -1, false, TYPALIGN_INT));
	return PointerGetDatum(construct_md_array(elements, nulls, 1, dims, lbs, type, 8, FLOAT8PASSBYVAL, TYPALIGN_DOUBLE));
}

static Datum
text_or_null(const char *string, bool *isnull)
{
	*isnull = string == NULL;
	return string == NULL ? (Datum) 0 : CStringGetTextDatum(string);
}

/* Store n failures, new ones or those of a retry chunk. */
static void
store_failures(RedriveChunk *chunk, int n, RedriveFailure **failures)
{
	Datum	   *elements[F_COLUMNS];
	bool	   *nulls[F_COLUMNS];
	Datum		values[4 + F_COLUMNS];

	for (int c = 0; c < F_COLUMNS; c++)
	{
		elements[c] = palloc(n * sizeof(Datum));
		nulls[c] = palloc0(n * sizeof(bool));
	}
	for (int i = 0; i < n; i++)
	{
		RedriveFailure *f = failures[i];

		elements[F_ITEM_NO][i] = Int64GetDatum(f->item->item_no);
		elements[F_STATE][i] = CStringGetTextDatum(f->state);
		elements[F_REASON][i] = text_or_null(f->reason, &nulls[F_REASON][i]);
		elements[F_RULE_ID][i] = Int32GetDatum(f->rule_id);
		nulls[F_RULE_ID][i] = f->rule_id == 0;
		elements[F_CLASS][i] = CStringGetTextDatum(f->error_class);
		elements[F_SQLSTATE][i] = CStringGetTextDatum(unpack_sql_state(f->error->sqlerrcode));
		elements[F_FINGERPRINT][i] = CStringGetTextDatum(psprintf("%016llx", (unsigned long long) f->fingerprint));
		elements[F_RETRY_COUNT][i] = Int32GetDatum(f->retry_count);
		elements[F_FREE_COUNT][i] = Int32GetDatum(f->free_count);
		elements[F_ATTEMPTS][i] = Int32GetDatum(f->attempts);
		elements[F_FAILED_AT][i] = TimestampTzGetDatum(f->failed_at);
		elements[F_NEXT_AT][i] = TimestampTzGetDatum(f->next_attempt_at);
		nulls[F_NEXT_AT][i] = f->next_attempt_at == 0;
		elements[F_KEY][i] = PointerGetDatum(f->item->key);
		nulls[F_KEY][i] = f->item->key == NULL;
		elements[F_MESSAGE][i] = CStringGetTextDatum(f->error->message ? f->error->message : "");
		elements[F_DETAIL][i] = text_or_null(f->error->detail, &nulls[F_DETAIL][i]);
		elements[F_HINT][i] = text_or_null(f->error->hint, &nulls[F_HINT][i]);
		elements[F_CONTEXT][i] = text_or_null(f->error->context, &nulls[F_CONTEXT][i]);
		elements[F_CONSTRAINT][i] = text_or_null(f->error->constraint_name, &nulls[F_CONSTRAINT][i]);
	}
	values[0] = Int16GetDatum(chunk->part);
	values[1] = Int64GetDatum(chunk->batch_id);
	for (int c = 0; c < F_COLUMNS; c++)
		values[4 + c] = make_array(failure_types[c], n, elements[c], nulls[c]);
	if (chunk->retry)
	{
		values[2] = values[4 + F_ITEM_NO];
		(void) redrive_part_sql(&log_superseded, chunk->part, values, NULL);
	}
	values[2] = Int32GetDatum(chunk->handler.handler_id);
	values[3] = Int32GetDatum(chunk->run_no);
	(void) redrive_part_sql(chunk->retry ? &update_failures : &insert_failures, chunk->part, values, NULL);
}

/* Mark the items of a retry chunk that succeeded. */
static void
store_recovered(RedriveChunk *chunk, int n, Datum *item_nos)
{
	Datum		values[3];

	values[0] = Int16GetDatum(chunk->part);
	values[1] = Int64GetDatum(chunk->batch_id);
	values[2] = make_array(INT8OID, n, item_nos, palloc0(n * sizeof(bool)));
	(void) redrive_part_sql(&recover_failures, chunk->part, values, NULL);
}

/*
 * Unlock the keys of items that are final, and tell the application: now, in
 * this transaction, or if that fails by a row in callbacks.
 */
static void
unlock(RedriveChunk *chunk, int n, Datum *keys)
{
	Datum		values[5];
	ErrorData  *error = NULL;

	values[0] = Int32GetDatum(chunk->handler.handler_id);
	values[1] = make_array(TEXTOID, n, keys, palloc0(n * sizeof(bool)));
	values[2] = Int64GetDatum(chunk->batch_id);
	(void) redrive_sql(&release_locks, values, NULL);
	if (chunk->handler.on_unlock == NULL)
		return;
	if (redrive_run_callbacks(chunk->handler.on_unlock, false, chunk->handler.item_timeout, n, keys, &error))
		return;
	values[3] = Int32GetDatum(chunk->run_no);
	values[4] = CStringGetTextDatum(error->message ? error->message : "");
	(void) redrive_sql(&later_unlocks, values, NULL);
	redrive_wake_at_commit(GetUserId(), 0);
}

/*
 * Record a commit interval; the caller commits.
 *
 * ends_chunk: nothing is left of the chunk.  Returns whether the batch is
 * still to be run: false when it was paused or cancelled meanwhile, then the
 * caller gives the rest back.  Throws RD003 when the chunk was taken over.
 */
bool
redrive_record(RedriveChunk *chunk, RedriveInterval *interval, bool ends_chunk)
{
	const int	n = interval->end - interval->first;
	RedriveFailure **failures = palloc(Max(n, 1) * sizeof(RedriveFailure *));
	Datum	   *recovered = palloc(Max(n, 1) * sizeof(Datum));
	Datum	   *keys = palloc(Max(n, 1) * sizeof(Datum));
	int			n_failures = 0,
				n_recovered = 0,
				n_keys = 0;
	int64		ignored = 0,
				failed = 0,
				waiting = 0;
	TimestampTz next_retry_at = 0;
	TimestampTz oldest = 0;
	Datum		values[9];
	char		nulls[] = "         ";

	for (int i = interval->first; i < interval->end; i++)
	{
		RedriveItem *item = &chunk->page[i];
		RedriveFailure *f = item->failure;
		bool		final = f == NULL || strcmp(f->state, "waiting") != 0;

		if (f != NULL)
			failures[n_failures++] = f;
		else if (chunk->retry)
			recovered[n_recovered++] = Int64GetDatum(item->item_no);
		if (final && item->key != NULL)
			keys[n_keys++] = PointerGetDatum(item->key);
		if (f == NULL)
			continue;
		if (!final)
		{
			waiting++;
			if (f->next_attempt_at != 0 && (next_retry_at == 0 || f->next_attempt_at < next_retry_at))
				next_retry_at = f->next_attempt_at;
			if (oldest == 0 || f->failed_at < oldest)
				oldest = f->failed_at;
		}
		else if (strcmp(f->state, "ignored") == 0)
			ignored++;
		else
			failed++;
	}

	if (n_failures > 0)
		store_failures(chunk, n_failures, failures);
	if (n_recovered > 0)
		store_recovered(chunk, n_recovered, recovered);
	if (n_keys > 0)
		unlock(chunk, n_keys, keys);
	if (waiting > 0)
	{
		values[0] = Int64GetDatum(chunk->batch_id);
		values[1] = TimestampTzGetDatum(next_retry_at);
		nulls[1] = next_retry_at == 0 ? 'n' : ' ';
		values[2] = TimestampTzGetDatum(oldest);
		if (redrive_sql(&note_waiting, values, nulls) > 0)
			redrive_wake_supervisor_at_commit();
	}
	if (interval->pause_reason != NULL)
	{
		values[0] = Int64GetDatum(chunk->batch_id);
		values[1] = CStringGetTextDatum(interval->pause_reason);
		(void) redrive_sql(&pause_batch, values, NULL);
	}

	values[0] = Int64GetDatum(chunk->chunk_id);
	values[1] = Int64GetDatum(chunk->lease_token);
	values[2] = Int64GetDatum(ends_chunk ? chunk->to_no : n > 0 ? chunk->page[interval->end - 1].item_no : chunk->done_to);
	values[3] = Int64GetDatum(n);
	values[4] = Int64GetDatum(n - n_failures);
	values[5] = Int64GetDatum(ignored);
	values[6] = Int64GetDatum(failed);
	values[7] = Int64GetDatum(waiting);
	values[8] = BoolGetDatum(ends_chunk);
	if (redrive_sql(&fence, values, NULL) != 1)
		ereport(ERROR,
				(errcode(ERRCODE_REDRIVE_FENCED),
				 errmsg("chunk %lld was taken over by another worker", (long long) chunk->chunk_id),
				 errdetail("Lease token %lld is not valid any more.", (long long) chunk->lease_token),
				 errhint("Nothing is lost: the work of this interval is rolled back and done by the other worker.")));
	return redrive_bool(0, "live");
}
