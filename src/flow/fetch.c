/*-------------------------------------------------------------------------
 *
 * fetch.c
 *	  Read the items of a chunk, a page at a time.
 *
 * Items are read once per page, not once per commit.  A first chunk is a range
 * of items, and its pages whole blocks; a retry chunk has a list of them, and
 * its pages copies of single items, each block being read once.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "catalog/pg_type.h"
#include "utils/array.h"
#include "utils/builtins.h"
#include "utils/datum.h"
#include "utils/memutils.h"
#include "utils/snapmgr.h"
#include "utils/timestamp.h"

#include "base/compat.h"
#include "base/spi_call.h"
#include "flow/fetch.h"
#include "flow/suspect.h"

/* A page has so many blocks, or one that is larger than this. */
#define PAGE_BLOCKS 64
#define PAGE_BLOCK_BYTES 65536

/* A page of retries has so many items, or so many bytes of them. */
#define PAGE_RETRIES 4096
#define PAGE_RETRY_BYTES (PAGE_BLOCKS * PAGE_BLOCK_BYTES)

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

/* The block that holds one item. */
static RedrivePartSql fetch_block =
{
	"SELECT x.first_no, x.items, x.keys, x.payloads FROM redrive.item_blocks_@ AS x"
	" WHERE x.part = $1 AND x.batch_id = $2 AND x.first_no <= $3 ORDER BY x.first_no DESC LIMIT 1",
	3,
	{
		INT2OID, INT8OID, INT8OID
	}
};

/* The list is in the order of the items. */
static RedriveSql fetch_list =
{
	"SELECT u.item_no, u.attempts, u.free_count, u.first_failed_at FROM redrive.retry_lists AS l"
	" CROSS JOIN LATERAL unnest(l.item_nos, l.attempts, l.free_counts, l.first_failed_at)"
	"  AS u (item_no, attempts, free_count, first_failed_at)"
	" WHERE l.chunk_id = $1 AND u.item_no > $2",
	2, {INT8OID, INT8OID}
};

/*
 * Take a fetched block apart: the arrays are in CurrentMemoryContext, the
 * elements point into them.  keys is NULL when no item has one.
 */
static void
take_apart(int row, Datum **payloads, Datum **keys, bool **nulls, int *items)
{
	bool		isnull;

	deconstruct_array(DatumGetArrayTypePCopy(redrive_column(row, "payloads", &isnull)),
					  JSONBOID, -1, false, TYPALIGN_INT, payloads, NULL, items);
	*keys = NULL;
	(void) redrive_column(row, "keys", &isnull);
	if (!isnull)
		deconstruct_array(DatumGetArrayTypePCopy(redrive_column(row, "keys", &isnull)),
						  TEXTOID, -1, false, TYPALIGN_INT, keys, nulls, items);
}

/* Add the wanted items of a fetched block to the page. */
static void
unpack_block(RedriveChunk *chunk, int row, RedriveItem **page, int *n, int *room)
{
	int64		first_no = redrive_int64(row, "first_no");
	Datum	   *payloads;
	Datum	   *keys;
	bool	   *nulls;
	int			items;

	take_apart(row, &payloads, &keys, &nulls, &items);
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

/* Read the page of a first chunk; the caller is in the page's context. */
static void
fetch_range(RedriveChunk *chunk)
{
	Datum		values[6];
	uint64		rows;
	int			room = 1024;
	int64		next_no = 0;

	values[0] = Int16GetDatum(chunk->part);
	values[1] = Int64GetDatum(chunk->batch_id);
	values[2] = Int64GetDatum(chunk->done_to + 1);
	values[3] = Int64GetDatum(chunk->to_no);
	values[4] = Int32GetDatum(PAGE_BLOCKS);
	values[5] = Int32GetDatum(PAGE_BLOCK_BYTES);
	rows = redrive_part_sql(&fetch_items, chunk->part, values, NULL);

	chunk->page = palloc(room * sizeof(RedriveItem));
	for (uint64 row = 0; row < rows; row++)
	{
		bool		isnull;

		/* a large block in between is left to a page of its own */
		if (row > 0 && redrive_int64(row, "first_no") != next_no)
			break;
		next_no = redrive_int64(row, "first_no") + DatumGetInt32(redrive_column(row, "items", &isnull));
		unpack_block(chunk, row, &chunk->page, &chunk->page_items, &room);
	}
	redrive_free_rows();
}

/* Read the list of a retry chunk, once per claim. */
static void
read_list(RedriveChunk *chunk)
{
	Datum		values[2];
	uint64		rows;

	values[0] = Int64GetDatum(chunk->chunk_id);
	values[1] = Int64GetDatum(chunk->done_to);
	rows = redrive_sql(&fetch_list, values, NULL);
	chunk->list = MemoryContextAllocHuge(chunk->cxt, Max(rows, 1) * sizeof(RedriveItem));
	chunk->list_items = (int) rows;
	for (uint64 row = 0; row < rows; row++)
	{
		RedriveItem *item = &chunk->list[row];
		bool		isnull;

		memset(item, 0, sizeof(RedriveItem));
		item->item_no = redrive_int64(row, "item_no");
		item->attempts = DatumGetInt32(redrive_column(row, "attempts", &isnull));
		item->free_count = DatumGetInt32(redrive_column(row, "free_count", &isnull));
		item->first_failed_at = redrive_time(row, "first_failed_at");
	}
	redrive_free_rows();
}

/* Read the page of a retry chunk; the caller is in the page's context. */
static void
fetch_retries(RedriveChunk *chunk)
{
	MemoryContext block_cxt = AllocSetContextCreate(CurrentMemoryContext, "redrive block", ALLOCSET_DEFAULT_SIZES);
	Size		bytes = 0;
	int			start = 0;
	int64		first_no = 0,
				next_no = 0;
	Datum	   *payloads = NULL;
	Datum	   *keys = NULL;
	bool	   *nulls = NULL;

	if (chunk->list == NULL)
		read_list(chunk);
	while (start < chunk->list_items && chunk->list[start].item_no <= chunk->done_to)
		start++;
	chunk->list += start;
	chunk->list_items -= start;
	chunk->page = palloc(Min(Max(chunk->list_items, 1), PAGE_RETRIES) * sizeof(RedriveItem));

	for (int i = 0; i < chunk->list_items && i < PAGE_RETRIES && bytes < PAGE_RETRY_BYTES; i++)
	{
		RedriveItem *item = &chunk->page[i];
		int			place;

		*item = chunk->list[i];
		if (item->item_no >= next_no)
		{
			Datum		values[3];
			bool		isnull;
			MemoryContext old_cxt;

			values[0] = Int16GetDatum(chunk->part);
			values[1] = Int64GetDatum(chunk->batch_id);
			values[2] = Int64GetDatum(item->item_no);
			if (redrive_part_sql(&fetch_block, chunk->part, values, NULL) == 0)
				break;
			first_no = redrive_int64(0, "first_no");
			next_no = first_no + DatumGetInt32(redrive_column(0, "items", &isnull));
			MemoryContextReset(block_cxt);
			old_cxt = MemoryContextSwitchTo(block_cxt);
			take_apart(0, &payloads, &keys, &nulls, &place);
			MemoryContextSwitchTo(old_cxt);
			redrive_free_rows();
			if (item->item_no >= next_no)
				break;
		}
		place = (int) (item->item_no - first_no);
		item->payload = datumCopy(payloads[place], false, -1);
		if (keys != NULL && !nulls[place])
			item->key = DatumGetTextPCopy(keys[place]);
		bytes += VARSIZE_ANY(DatumGetPointer(item->payload));
		chunk->page_items = i + 1;
	}
	MemoryContextDelete(block_cxt);
}

/*
 * Read the next page of the chunk's items, those after done_to.
 *
 * Returns false, with an empty page, when items that should be there are not.
 * Needs a transaction.
 */
bool
redrive_fetch_page(RedriveChunk *chunk)
{
	MemoryContext old_cxt;
	bool		found;

	MemoryContextReset(chunk->page_cxt);
	chunk->page = NULL;
	chunk->page_items = chunk->page_next = 0;

	old_cxt = MemoryContextSwitchTo(chunk->page_cxt);
	/* large payloads are stored out of line */
	PushActiveSnapshot(GetTransactionSnapshot());
	if (chunk->retry)
		fetch_retries(chunk);
	else
		fetch_range(chunk);
	PopActiveSnapshot();
	MemoryContextSwitchTo(old_cxt);

	found = chunk->page_items > 0 &&
		(chunk->retry || chunk->page[chunk->page_items - 1].item_no - chunk->done_to == chunk->page_items);
	if (found)
		redrive_mark_suspects(chunk);
	else
		chunk->page_items = 0;
	return found;
}
