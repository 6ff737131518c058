/*-------------------------------------------------------------------------
 *
 * claim.c
 *	  Take a chunk, give it back.
 *
 * The claim is committed before any item runs: whatever happens then, the
 * chunk row says who had it.  A worker is identified by its pid and start
 * time, which pg_stat_activity shows as long as it lives, preloaded or not.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "catalog/pg_type.h"
#include "miscadmin.h"
#include "utils/array.h"
#include "utils/builtins.h"
#include "utils/memutils.h"
#include "utils/snapmgr.h"
#include "utils/timestamp.h"

#include "base/crumbs.h"
#include "base/guc.h"
#include "base/spi_call.h"
#include "base/wake.h"
#include "base/xact.h"
#include "flow/claim.h"

/* A batch of so few items is claimed whole by the worker that is woken for it. */
#define SMALL_BATCH 100

/* The policy of a handler, read with each claim. */
#define HANDLER_COLUMNS \
	" h.handler_id, h.name, h.function, h.signature::text AS signature, h.max_retries," \
	" (extract(epoch FROM h.retry_delay) * 1000000)::bigint AS retry_delay, h.retry_factor," \
	" (extract(epoch FROM h.retry_delay_max) * 1000000)::bigint AS retry_delay_max," \
	" (extract(epoch FROM h.item_timeout) * 1000000)::bigint AS item_timeout," \
	" (extract(epoch FROM h.commit_interval) * 1000000)::bigint AS commit_interval," \
	" h.isolation = 'item' AS one_by_one, h.on_unlock"

static RedriveSql claim_chunk = {
	.lookups = true,
	.text =
	"SELECT c.chunk_id, c.batch_id, c.part, c.run_no, c.kind = 'retry' AS retry, c.done_to, c.to_no, c.items,"
	" c.lease_token, c.more,"
	" EXISTS (SELECT FROM redrive.crashes AS x WHERE x.batch_id = c.batch_id) AS crashed," HANDLER_COLUMNS
	" FROM redrive._claim($1, $2, $3, $4, $5) AS c LEFT JOIN redrive.handlers AS h ON h.handler_id = c.handler_id",
	.nargs = 5,.argtypes = {OIDOID, INT4OID, TIMESTAMPTZOID, INT4OID, BOOLOID}
};

/*
 * The whole of a batch that has just become ready, for the worker that was
 * woken for it: what _claim would do, in one statement.
 */
static RedriveSql claim_hinted = {
	"WITH b AS MATERIALIZED ("
	"  SELECT s.batch_id, s.part, s.run_no, s.total, h.*"
	"  FROM redrive.batches AS s JOIN redrive.handlers AS h ON h.handler_id = s.handler_id"
	"  WHERE s.batch_id = $4 AND s.claimable AND s.claimed_to = 0 AND s.total <= $5 AND s.serve_after <= $6"
	"  AND h.owner = $1 AND h.kind <> 'external' AND NOT h.paused AND h.max_workers IS NULL"
	"  FOR UPDATE OF s SKIP LOCKED),"
	" u AS (UPDATE redrive.batches AS s"
	"  SET state = 'running', claimed_to = s.total, serve_after = $6, last_progress_at = $6, started_at = coalesce(s.started_at, $6)"
	"  FROM b WHERE s.batch_id = b.batch_id),"
	" c AS (INSERT INTO redrive.chunks (batch_id, handler_id, part, run_no, kind, state, from_no, to_no, done_to, items,"
	"   lease_token, worker_pid, worker_started_at, claimed_at, progress_at)"
	"  SELECT b.batch_id, b.handler_id, b.part, b.run_no, 'first', 'running', 1, b.total, 0, b.total,"
	"   redrive._lease_token(), $2, $3, $6, $6 FROM b"
	"  RETURNING chunk_id, done_to, to_no, items, lease_token)"
	" SELECT c.chunk_id, h.batch_id, h.part, h.run_no, false AS retry, c.done_to, c.to_no, c.items, c.lease_token,"
	" false AS more, false AS crashed," HANDLER_COLUMNS
	" FROM c CROSS JOIN b AS h",
	6, {OIDOID, INT4OID, TIMESTAMPTZOID, INT8OID, INT8OID, TIMESTAMPTZOID}
};

static RedriveSql give_back = {
	"SELECT redrive._give_back($1, $2, $3)",
	3, {INT8OID, INT8OID, BOOLOID}
};

static RedriveSql rescue = {
	"SELECT redrive._orphan_lost(), redrive._fold_ended()",
	0, {0}
};

static RedriveSql fold_ended = {
	"SELECT redrive._fold_ended() AS batches",
	0, {0}
};

static RedriveSql left_unfolded = {
	"SELECT EXISTS (SELECT FROM redrive.chunks AS x"
	" WHERE NOT x.folded AND x.state = 'done') AS any",
	0, {0}
};

static RedriveSql fold = {
	"SELECT redrive._fold($1)::text AS state",
	1, {INT8OID}
};

/* Read the handler's policy out of a claim_chunk row into the chunk. */
static void
read_handler(RedriveChunk *chunk)
{
	RedriveHandler *handler = &chunk->handler;
	bool		isnull;
	char	   *signature;

	handler->handler_id = DatumGetInt32(redrive_column(0, "handler_id", &isnull));
	handler->name = redrive_text(0, "name", chunk->cxt);
	handler->function = redrive_text(0, "function", chunk->cxt);
	signature = redrive_text(0, "signature", chunk->cxt);
	handler->signature = strcmp(signature, "items") == 0 ? SIGNATURE_ITEMS :
		strcmp(signature, "item") == 0 ? SIGNATURE_ITEM :
		strcmp(signature, "key_payload") == 0 ? SIGNATURE_KEY_PAYLOAD : SIGNATURE_PAYLOAD;
	handler->max_retries = DatumGetInt32(redrive_column(0, "max_retries", &isnull));
	handler->retry_delay = redrive_int64(0, "retry_delay");
	(void) redrive_column(0, "retry_delay", &isnull);
	if (isnull)
		handler->retry_delay = -1;
	handler->retry_factor = DatumGetFloat8(redrive_column(0, "retry_factor", &isnull));
	handler->retry_delay_max = redrive_int64(0, "retry_delay_max");
	handler->item_timeout = redrive_int64(0, "item_timeout");
	handler->commit_interval = redrive_int64(0, "commit_interval");
	handler->one_by_one = redrive_bool(0, "one_by_one");
	handler->on_unlock = redrive_text(0, "on_unlock", chunk->cxt);
}

/*
 * Claim a chunk for the handlers of a role, and commit the claim.
 *
 * The chunk lives in a context of its own under parent: deleting chunk->cxt
 * frees all of it.  more tells whether other workers could help.  hint: a batch
 * that is ready, 0 = search.  callbacks: in, whether to look for due callbacks
 * too; out, whether they come first.  Returns NULL when nothing is due, or
 * callbacks are, or with more when what is due is of handlers that others have
 * locked: they will not say when they let go.  Needs a non-atomic connection; a
 * new transaction is open afterwards.
 */
RedriveChunk *
redrive_claim(Oid owner, int64 hint, MemoryContext parent, bool *more, bool *callbacks)
{
	Datum		values[6];
	RedriveChunk *chunk;
	MemoryContext cxt;
	bool		isnull;
	bool		hinted;
	uint64		rows;
	const bool	look_for_callbacks = *callbacks;

	values[0] = ObjectIdGetDatum(owner);
	values[1] = Int32GetDatum(MyProcPid);
	values[2] = TimestampTzGetDatum(MyStartTimestamp);
	values[3] = Int64GetDatum(hint);
	values[4] = Int64GetDatum(SMALL_BATCH);
	values[5] = TimestampTzGetDatum(GetCurrentTimestamp());
	hinted = hint != 0 && redrive_sql(&claim_hinted, values, NULL) == 1;
	if (hinted)
		*callbacks = false;
	else
	{
		values[3] = Int32GetDatum(Max(redrive_max_workers, 1));
		values[4] = BoolGetDatum(*callbacks);
		*callbacks = false;
		rows = redrive_sql(&claim_chunk, values, NULL);
		*more = rows > 0 && redrive_bool(0, "more");
		if (rows == 0 || (*more && redrive_int64(0, "chunk_id") == 0))
		{
			redrive_commit();
			return NULL;
		}
	}
	(void) redrive_column(0, "handler_id", &isnull);
	if (isnull && redrive_int64(0, "chunk_id") != 0)
	{
		/*
		 * The handler was committed after our statement began: _claim, which
		 * is volatile, sees it, the join around it does not.  Claim anew.
		 */
		redrive_rollback();
		*callbacks = look_for_callbacks;
		return redrive_claim(owner, 0, parent, more, callbacks);
	}
	if (redrive_int64(0, "chunk_id") == 0)
	{
		*callbacks = true;
		return NULL;
	}
	cxt = AllocSetContextCreate(parent, "redrive chunk", ALLOCSET_DEFAULT_SIZES);
	chunk = MemoryContextAllocZero(cxt, sizeof(RedriveChunk));
	chunk->cxt = cxt;
	chunk->page_cxt = AllocSetContextCreate(cxt, "redrive page", ALLOCSET_DEFAULT_SIZES);
	chunk->chunk_id = redrive_int64(0, "chunk_id");
	chunk->batch_id = redrive_int64(0, "batch_id");
	chunk->part = DatumGetInt16(redrive_column(0, "part", &isnull));
	chunk->run_no = DatumGetInt32(redrive_column(0, "run_no", &isnull));
	chunk->retry = redrive_bool(0, "retry");
	chunk->crashed = redrive_bool(0, "crashed");
	chunk->done_to = redrive_int64(0, "done_to");
	chunk->to_no = redrive_int64(0, "to_no");
	chunk->lease_token = redrive_int64(0, "lease_token");
	chunk->claimed_at = GetCurrentTimestamp();
	*more = redrive_bool(0, "more");
	read_handler(chunk);

	/*
	 * Where latency counts the disk is not waited for: no effect of the items
	 * can become durable before the claim, which precedes it in the WAL, and
	 * an item that crashes the server is known by its batch.
	 */
	if (hinted)
		redrive_commit_lazily();
	else
		redrive_commit_durably();
	return chunk;
}

/*
 * Give the rest of the chunk back, for another worker to take, and commit.
 * Does nothing when it has been taken over.  lost: after an error; counted, and
 * too many pause the batch.
 */
void
redrive_give_back(RedriveChunk *chunk, bool lost)
{
	Datum		values[3];

	values[0] = Int64GetDatum(chunk->chunk_id);
	values[1] = Int64GetDatum(chunk->lease_token);
	values[2] = BoolGetDatum(lost);
	(void) redrive_sql(&give_back, values, NULL);
	redrive_batch_ended_at_commit();
	redrive_commit();
}

/*
 * Add the ended chunk to its batch, and move the batch on if it was the last
 * one; the caller commits.
 *
 * The stale pass does the same if a crash swallows this, so the commit need
 * not wait for the disk.
 */
void
redrive_fold(RedriveChunk *chunk)
{
	Datum		values[1];
	char	   *state;

	values[0] = Int64GetDatum(chunk->batch_id);
	redrive_sql_one_row(&fold, values, NULL);
	state = redrive_text(0, "state", CurrentMemoryContext);
	if (state != NULL && (strcmp(state, "finished") == 0 || strcmp(state, "paused") == 0 ||
						  strcmp(state, "cancelled") == 0))
		redrive_batch_ended_at_commit();
}

/*
 * Count the items that crashed the server, take back the chunks of workers that
 * are gone, fold those that nobody folded, and commit.
 */
void
redrive_rescue(void)
{
	(void) redrive_sql(&rescue, NULL, NULL);
	redrive_commit_durably();
	redrive_forget_crumbs(MyDatabaseId);
}

/*
 * Fold what has ended, in the supervisor, and commit.  Returns whether something
 * is left, of a batch that somebody has locked: it is to be asked again.
 */
bool
redrive_fold_ended(void)
{
	bool		left;

	redrive_sql_one_row(&fold_ended, NULL, NULL);
	if (redrive_int64(0, "batches") > 0)
		redrive_batch_ended_at_commit();
	redrive_sql_one_row(&left_unfolded, NULL, NULL);
	left = redrive_bool(0, "any");
	redrive_commit_lazily();
	return left;
}
