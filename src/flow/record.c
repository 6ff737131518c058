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
#include "base/table_insert.h"
#include "base/wake.h"
#include "flow/handler.h"
#include "flow/record.h"
#include "flow/segment.h"
#include "flow/suspect.h"

/* The columns of redrive.failures, in the table's order. */
enum
{
	F_PART, F_BATCH_ID, F_ITEM_NO, F_HANDLER_ID, F_RUN_NO, F_STATE, F_REASON, F_RULE_ID, F_CLASS, F_SQLSTATE, F_FINGERPRINT,
	F_RETRY_COUNT, F_FREE_COUNT, F_ATTEMPTS, F_FIRST_AT, F_LAST_AT, F_NEXT_AT, F_KEY, F_MESSAGE, F_DETAIL, F_HINT, F_CONTEXT,
	F_CONSTRAINT, F_COLUMNS
};

/* One probe of the index per key, whatever is known of the table when this is planned. */
static RedriveSql release_locks = {
	"DELETE FROM redrive.locks WHERE ctid = ANY (ARRAY("
	" SELECT x.ctid FROM unnest($2) AS u (key) CROSS JOIN LATERAL ("
	"  SELECT l.ctid FROM redrive.locks AS l WHERE l.handler_id = $1 AND l.key = u.key AND l.batch_id = $3 OFFSET 0) AS x))",
	3, {INT4OID, TEXTARRAYOID, INT8OID}
};

static RedriveSql later_unlocks = {
	"INSERT INTO redrive.callbacks (handler_id, batch_id, kind, key, run_no, message, crash_count, next_attempt_at)"
	" SELECT $1, $3, 'on_unlock', k, $4, $5, $6, clock_timestamp() FROM unnest($2) AS k",
	6, {INT4OID, TEXTARRAYOID, INT8OID, INT4OID, TEXTOID, INT4OID}
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
	" WHERE c.chunk_id = $1 AND c.lease_token = $2 AND c.worker_pid IS NOT NULL"
	" RETURNING (SELECT b.state IN ('running', 'retrying') FROM redrive.batches AS b WHERE b.batch_id = c.batch_id) AS live",
	9, {INT8OID, INT8OID, INT8OID, INT8OID, INT8OID, INT8OID, INT8OID, INT8OID, BOOLOID}
};

static Datum
text_or_null(const char *string, bool *isnull)
{
	*isnull = string == NULL;
	return string == NULL ? (Datum) 0 : CStringGetTextDatum(string);
}

/*
 * Store n failures.  Those of a retry chunk are new rows too: the old ones went
 * to the log when the chunk was made.
 */
void
redrive_store_failures(RedriveChunk *chunk, int n, RedriveFailure **failures)
{
	Datum	   *all = palloc0((Size) n * F_COLUMNS * sizeof(Datum));
	bool	   *all_nulls = palloc0((Size) n * F_COLUMNS * sizeof(bool));

	for (int i = 0; i < n; i++)
	{
		RedriveFailure *f = failures[i];
		Datum	   *values = all + (Size) i * F_COLUMNS;
		bool	   *nulls = all_nulls + (Size) i * F_COLUMNS;

		values[F_PART] = Int16GetDatum(chunk->part);
		values[F_BATCH_ID] = Int64GetDatum(chunk->batch_id);
		values[F_ITEM_NO] = Int64GetDatum(f->item->item_no);
		values[F_HANDLER_ID] = Int32GetDatum(chunk->handler.handler_id);
		values[F_RUN_NO] = Int32GetDatum(chunk->run_no);
		values[F_STATE] = redrive_enum("failure_state", f->state);
		nulls[F_REASON] = f->reason == NULL;
		if (f->reason != NULL)
			values[F_REASON] = redrive_enum("fail_reason", f->reason);
		values[F_RULE_ID] = Int32GetDatum(f->rule_id);
		nulls[F_RULE_ID] = f->rule_id == 0;
		values[F_CLASS] = CStringGetTextDatum(f->error_class);
		values[F_SQLSTATE] = CStringGetTextDatum(f->code != NULL ? f->code : unpack_sql_state(f->error->sqlerrcode));
		values[F_FINGERPRINT] = CStringGetTextDatum(psprintf("%016llx", (unsigned long long) f->fingerprint));
		values[F_RETRY_COUNT] = Int32GetDatum(f->retry_count);
		values[F_FREE_COUNT] = Int32GetDatum(f->free_count);
		values[F_ATTEMPTS] = Int32GetDatum(f->attempts);
		values[F_FIRST_AT] = TimestampTzGetDatum(f->item->first_failed_at != 0 ? f->item->first_failed_at : f->failed_at);
		values[F_LAST_AT] = TimestampTzGetDatum(f->failed_at);
		values[F_NEXT_AT] = TimestampTzGetDatum(f->next_attempt_at);
		nulls[F_NEXT_AT] = f->next_attempt_at == 0;
		values[F_KEY] = PointerGetDatum(f->item->key);
		nulls[F_KEY] = f->item->key == NULL;
		values[F_MESSAGE] = CStringGetTextDatum(f->error->message ? f->error->message : "");
		values[F_DETAIL] = text_or_null(f->error->detail, &nulls[F_DETAIL]);
		values[F_HINT] = text_or_null(f->error->hint, &nulls[F_HINT]);
		values[F_CONTEXT] = text_or_null(f->error->context, &nulls[F_CONTEXT]);
		values[F_CONSTRAINT] = text_or_null(f->error->constraint_name, &nulls[F_CONSTRAINT]);
	}
	redrive_table_insert(psprintf("failures_%d", chunk->part), F_COLUMNS, n, all, all_nulls);
}

/*
 * Leave on_unlock for these keys to rows in callbacks.  crash_count is how often
 * it may have crashed the server already.
 */
static void
unlock_later(RedriveChunk *chunk, int n, Datum *keys, const char *message, int32 crash_count)
{
	Datum		values[6];

	values[0] = Int32GetDatum(chunk->handler.handler_id);
	values[1] = redrive_array(TEXTOID, n, keys, NULL);
	values[2] = Int64GetDatum(chunk->batch_id);
	values[3] = Int32GetDatum(chunk->run_no);
	values[4] = CStringGetTextDatum(message ? message : "");
	values[5] = Int32GetDatum(crash_count);
	(void) redrive_sql(&later_unlocks, values, NULL);
	redrive_wake_at_commit(GetUserId(), 0);
}

/*
 * Unlock the keys of items that are final, and tell the application: now, in
 * this transaction, or if that fails by a row in callbacks.  An item that crashed
 * the server may have done so in on_unlock, which is not tried again in here.
 */
static void
unlock(RedriveChunk *chunk, int n, RedriveItem **items)
{
	Datum	   *keys = palloc(n * sizeof(Datum));
	int64	   *item_nos = palloc(n * sizeof(int64));
	int			n_now = 0;
	Datum		values[3];
	ErrorData  *error = NULL;

	for (int i = 0; i < n; i++)
		keys[i] = PointerGetDatum(items[i]->key);
	values[0] = Int32GetDatum(chunk->handler.handler_id);
	values[1] = redrive_array(TEXTOID, n, keys, NULL);
	values[2] = Int64GetDatum(chunk->batch_id);
	(void) redrive_sql(&release_locks, values, NULL);
	if (chunk->handler.on_unlock == NULL)
		return;
	for (int i = 0; i < n; i++)
	{
		if (items[i]->suspect)
		{
			/* in quarantine it was the item itself */
			unlock_later(chunk, 1, &keys[i], NULL, items[i]->crash_count < MAX_CRASHES ? 1 : 0);
			continue;
		}
		keys[n_now] = keys[i];
		item_nos[n_now++] = items[i]->item_no;
	}
	if (n_now > 0 &&
		!redrive_run_callbacks(chunk->handler.on_unlock, CALLBACK_ON_UNLOCK, chunk->handler.item_timeout, n_now, keys,
							   CRUMB_UNLOCK, item_nos, NULL, &error))
		unlock_later(chunk, n_now, keys, error->message, 0);
}

/*
 * Say in the batch that items wait: until when the first of them, 0 = for the
 * pass, and since when the oldest.
 */
void
redrive_note_waiting(int64 batch_id, TimestampTz next_retry_at, TimestampTz oldest)
{
	Datum		values[3];
	char		nulls[] = "   ";

	values[0] = Int64GetDatum(batch_id);
	values[1] = TimestampTzGetDatum(next_retry_at);
	nulls[1] = next_retry_at == 0 ? 'n' : ' ';
	values[2] = TimestampTzGetDatum(oldest);
	if (redrive_sql(&note_waiting, values, nulls) > 0)
		redrive_wake_supervisor_at_commit();
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
	RedriveItem **keyed = palloc(Max(n, 1) * sizeof(RedriveItem *));
	int			n_failures = 0,
				n_keys = 0;
	int64		ignored = 0,
				failed = 0,
				waiting = 0;
	TimestampTz next_retry_at = 0;
	TimestampTz oldest = 0;
	Datum		values[9];

	for (int i = interval->first; i < interval->end; i++)
	{
		RedriveItem *item = &chunk->page[i];
		RedriveFailure *f = item->failure;
		bool		final = f == NULL || strcmp(f->state, "waiting") != 0;

		if (f != NULL)
			failures[n_failures++] = f;
		if (final && item->key != NULL)
			keyed[n_keys++] = item;
		if (f == NULL)
			continue;
		if (!final)
		{
			waiting++;
			if (f->next_attempt_at != 0 && (next_retry_at == 0 || f->next_attempt_at < next_retry_at))
				next_retry_at = f->next_attempt_at;
			if (oldest == 0 || f->failed_at < oldest)
				oldest = f->failed_at;
			if (item->first_failed_at != 0 && item->first_failed_at < oldest)
				oldest = item->first_failed_at;
		}
		else if (strcmp(f->state, "ignored") == 0)
			ignored++;
		else
			failed++;
	}

	if (n_failures > 0)
		redrive_store_failures(chunk, n_failures, failures);
	if (n_keys > 0)
		unlock(chunk, n_keys, keyed);
	if (waiting > 0)
		redrive_note_waiting(chunk->batch_id, next_retry_at, oldest);
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
