/*-------------------------------------------------------------------------
 *
 * claim.c
 *	  Take a chunk, read its items, give it back.
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

#include "base/guc.h"
#include "base/spi_call.h"
#include "base/wake.h"
#include "base/xact.h"
#include "flow/claim.h"

/* A page of items has so many blocks, or one that is larger than this. */
#define PAGE_BLOCKS 64
#define PAGE_BLOCK_BYTES 65536
#define PAGE_RETRIES 4096

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
	"SELECT c.chunk_id, c.batch_id, c.part, c.run_no, c.kind = 'retry' AS retry, c.done_to, c.to_no, c.items,"
	" c.lease_token, c.keyed, c.more," HANDLER_COLUMNS
	" FROM redrive._claim($1, $2, $3, $4, $5) AS c LEFT JOIN redrive.handlers AS h ON h.handler_id = c.handler_id",
	5, {OIDOID, INT4OID, TIMESTAMPTZOID, INT4OID, BOOLOID}
};

/*
 * The whole of a batch that has just become ready, for the worker that was
 * woken for it: what _claim would do, in one statement.
 */
static RedriveSql claim_hinted = {
	"WITH b AS MATERIALIZED ("
	"  SELECT s.batch_id, s.part, s.run_no, s.total, s.keyed, h.*"
	"  FROM redrive.batches AS s JOIN redrive.handlers AS h ON h.handler_id = s.handler_id"
	"  WHERE s.batch_id = $4 AND s.claimable AND s.claimed_to = 0 AND s.total <= $5 AND s.serve_after <= $6"
	"  AND h.owner = $1 AND NOT h.paused AND h.max_workers IS NULL"
	"  FOR UPDATE OF s SKIP LOCKED),"
	" u AS (UPDATE redrive.batches AS s"
	"  SET state = 'running', claimed_to = s.total, serve_after = $6, last_progress_at = $6, started_at = coalesce(s.started_at, $6)"
	"  FROM b WHERE s.batch_id = b.batch_id),"
	" c AS (INSERT INTO redrive.chunks (batch_id, handler_id, part, run_no, kind, state, from_no, to_no, done_to, items,"
	"   lease_token, worker_pid, worker_started_at, claimed_at, progress_at)"
	"  SELECT b.batch_id, b.handler_id, b.part, b.run_no, 'first', 'running', 1, b.total, 0, b.total,"
	"   nextval('redrive.lease_tokens'), $2, $3, $6, $6 FROM b"
	"  RETURNING chunk_id, done_to, to_no, items, lease_token)"
	" SELECT c.chunk_id, h.batch_id, h.part, h.run_no, false AS retry, c.done_to, c.to_no, c.items, c.lease_token,"
	" h.keyed, false AS more," HANDLER_COLUMNS
	" FROM c CROSS JOIN b AS h",
	6, {OIDOID, INT4OID, TIMESTAMPTZOID, INT8OID, INT8OID, TIMESTAMPTZOID}
};

/* The block that holds the first wanted item, and small ones after it. */
static RedrivePartSql fetch_items =
{
	"SELECT x.first_no, x.items, x.keys, x.payloads FROM redrive.item_blocks_@ AS x"
	" WHERE x.part = $1 AND x.batch_id = $2 AND x.first_no <= $4"
	" AND x.first_no >= (SELECT y.first_no FROM redrive.item_blocks_@ AS y"
	"  WHERE y.part = $1 AND y.batch_id = $2 AND y.first_no <= $3 ORDER BY y.first_no DESC LIMIT 1)"
	" AND (x.first_no <= $3 OR x.bytes <= $6)"
	" ORDER BY x.first_no LIMIT $5",
	6,
	{
		INT2OID, INT8OID, INT8OID, INT8OID, INT4OID, INT4OID
	}
};

/* Each with its block; only the payloads that are used are taken apart. */
static RedrivePartSql fetch_retries =
{
	"SELECT r.item_no, r.free_count, r.attempts, r.keys[r.place] AS key, r.payloads[r.place] AS payload"
	" FROM (SELECT f.item_no, f.free_count, f.attempts, (f.item_no - b.first_no + 1)::int AS place, b.keys, b.payloads,"
	"  b.bytes / b.items AS size, sum(b.bytes / b.items) OVER (ORDER BY f.item_no) AS upto"
	"  FROM (SELECT * FROM redrive.failures_@ AS x"
	"   WHERE x.part = $1 AND x.batch_id = $2 AND x.chunk_id = $3 AND x.state = 'running' AND x.item_no > $4"
	"   ORDER BY x.item_no LIMIT $5) AS f"
	"  CROSS JOIN LATERAL (SELECT * FROM redrive.item_blocks_@ AS x"
	"   WHERE x.part = $1 AND x.batch_id = $2 AND x.first_no <= f.item_no ORDER BY x.first_no DESC LIMIT 1) AS b) AS r"
	" WHERE r.upto - r.size < $6"
	" ORDER BY r.item_no",
	6,
	{
		INT2OID, INT8OID, INT8OID, INT8OID, INT4OID, INT4OID
	}
};

static RedriveSql give_back = {
	"SELECT redrive._give_back($1, $2, $3)",
	3, {INT8OID, INT8OID, BOOLOID}
};

static RedriveSql rescue = {
	"SELECT redrive._orphan_lost(), redrive._fold_ended()",
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
	handler->signature = strcmp(signature, "item") == 0 ? SIGNATURE_ITEM :
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
 * callbacks are.  Needs a non-atomic connection; a new transaction is open
 * afterwards.
 */
RedriveChunk *
redrive_claim(Oid owner, int64 hint, MemoryContext parent, bool *more, bool *callbacks)
{
	Datum		values[6];
	RedriveChunk *chunk;
	MemoryContext cxt;
	bool		isnull;
	const bool	look_for_callbacks = *callbacks;

	values[0] = ObjectIdGetDatum(owner);
	values[1] = Int32GetDatum(MyProcPid);
	values[2] = TimestampTzGetDatum(MyStartTimestamp);
	values[3] = Int64GetDatum(hint);
	values[4] = Int64GetDatum(SMALL_BATCH);
	values[5] = TimestampTzGetDatum(GetCurrentTimestamp());
	if (hint != 0 && redrive_sql(&claim_hinted, values, NULL) == 1)
		*callbacks = false;
	else
	{
		values[3] = Int32GetDatum(Max(redrive_max_workers, 1));
		values[4] = BoolGetDatum(*callbacks);
		*callbacks = false;
		if (redrive_sql(&claim_chunk, values, NULL) == 0)
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
	chunk->keyed = redrive_bool(0, "keyed");
	chunk->done_to = redrive_int64(0, "done_to");
	chunk->to_no = redrive_int64(0, "to_no");
	chunk->lease_token = redrive_int64(0, "lease_token");
	chunk->claimed_at = GetCurrentTimestamp();
	*more = redrive_bool(0, "more");
	read_handler(chunk);
	redrive_commit();
	return chunk;
}

/* Add the wanted items of a fetched block to the page. */
static void
unpack_block(RedriveChunk *chunk, int row, RedriveItem **page, int *n, int *room)
{
	bool		isnull;
	int64		first_no = redrive_int64(row, "first_no");
	Datum		payload_array = redrive_column(row, "payloads", &isnull);
	Datum		key_array = redrive_column(row, "keys", &isnull);
	Datum	   *payloads;
	Datum	   *keys = NULL;
	bool	   *nulls;
	int			items;

	/* copied into the page's context; elements point into the copy */
	deconstruct_array(DatumGetArrayTypePCopy(payload_array), JSONBOID, -1, false, TYPALIGN_INT,
					  &payloads, NULL, &items);
	if (!isnull)
		deconstruct_array(DatumGetArrayTypePCopy(key_array), TEXTOID, -1, false, TYPALIGN_INT,
						  &keys, &nulls, &items);
	for (int i = 0; i < items; i++)
	{
		RedriveItem *item;

		if (first_no + i <= chunk->done_to || first_no + i > chunk->to_no)
			continue;
		if (*n == *room)
		{
			*room = *room * 2;
			*page = repalloc_huge(*page, *room * sizeof(RedriveItem));
		}
		item = &(*page)[(*n)++];
		memset(item, 0, sizeof(RedriveItem));
		item->item_no = first_no + i;
		item->payload = payloads[i];
		item->key = keys != NULL && !nulls[i] ? (text *) DatumGetPointer(keys[i]) : NULL;
	}
}

/* Read one row of a retry chunk. */
static void
unpack_retry(int row, RedriveItem *item)
{
	bool		isnull;
	Datum		value;

	memset(item, 0, sizeof(RedriveItem));
	item->item_no = redrive_int64(row, "item_no");
	item->free_count = DatumGetInt32(redrive_column(row, "free_count", &isnull));
	item->attempts = DatumGetInt32(redrive_column(row, "attempts", &isnull));
	value = redrive_column(row, "key", &isnull);
	item->key = isnull ? NULL : DatumGetTextPCopy(value);
	value = redrive_column(row, "payload", &isnull);
	item->payload = PointerGetDatum(PG_DETOAST_DATUM_COPY(value));
}

/*
 * Read the next page of the chunk's items, those after done_to.
 *
 * Items are read once per page, not once per commit.  Returns false, with an
 * empty page, when items that should be there are not.  Needs a transaction.
 */
bool
redrive_fetch_page(RedriveChunk *chunk)
{
	Datum		values[6];
	uint64		rows;
	MemoryContext old_cxt;
	RedriveItem *page;
	int			n = 0;
	int			room = 1024;
	int64		next_no = 0;

	MemoryContextReset(chunk->page_cxt);
	chunk->page = NULL;
	chunk->page_items = chunk->page_next = 0;

	values[0] = Int16GetDatum(chunk->part);
	values[1] = Int64GetDatum(chunk->batch_id);
	if (chunk->retry)
	{
		values[2] = Int64GetDatum(chunk->chunk_id);
		values[3] = Int64GetDatum(chunk->done_to);
		values[4] = Int32GetDatum(PAGE_RETRIES);
		values[5] = Int32GetDatum(PAGE_BLOCKS * PAGE_BLOCK_BYTES);
		rows = redrive_part_sql(&fetch_retries, chunk->part, values, NULL);
		room = Max(rows, 1);
	}
	else
	{
		values[2] = Int64GetDatum(chunk->done_to + 1);
		values[3] = Int64GetDatum(chunk->to_no);
		values[4] = Int32GetDatum(PAGE_BLOCKS);
		values[5] = Int32GetDatum(PAGE_BLOCK_BYTES);
		rows = redrive_part_sql(&fetch_items, chunk->part, values, NULL);
	}

	old_cxt = MemoryContextSwitchTo(chunk->page_cxt);
	page = palloc(room * sizeof(RedriveItem));
	/* large payloads are stored out of line */
	PushActiveSnapshot(GetTransactionSnapshot());
	for (uint64 row = 0; row < rows; row++)
	{
		bool		isnull;

		/* a large block in between is left to a page of its own */
		if (!chunk->retry && row > 0 && redrive_int64(row, "first_no") != next_no)
			break;
		if (!chunk->retry)
			next_no = redrive_int64(row, "first_no") + DatumGetInt32(redrive_column(row, "items", &isnull));
		if (chunk->retry)
			unpack_retry(row, &page[n++]);
		else
			unpack_block(chunk, row, &page, &n, &room);
	}
	PopActiveSnapshot();
	MemoryContextSwitchTo(old_cxt);
	redrive_free_rows();
	if (n == 0 || (!chunk->retry && page[n - 1].item_no - chunk->done_to != n))
		return false;
	chunk->page = page;
	chunk->page_items = n;
	return true;
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
 * Add the ended chunk to its batch, move the batch on if it was the last one,
 * and commit.
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
	redrive_commit_lazily();
}

/*
 * Take back the chunks of workers that are gone, fold those that nobody folded,
 * and commit.
 */
void
redrive_rescue(void)
{
	(void) redrive_sql(&rescue, NULL, NULL);
	redrive_commit();
}
