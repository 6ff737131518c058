/*-------------------------------------------------------------------------
 *
 * suspect.c
 *	  Items that may crash the server.
 *
 * An item that crashed the server once runs alone, with what was before it
 * committed: if it does so again it is to blame, and nothing else is lost.  It is
 * not run a third time.  The same for items of which one crashed the server, when
 * nobody could say which.  Batches without a crash are spared the look.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "catalog/pg_type.h"

#include "base/spi_call.h"
#include "flow/suspect.h"

static RedriveSql find_suspects = {
	"SELECT x.item_no, x.crash_count FROM redrive.crashes AS x"
	" WHERE x.batch_id = $1 AND x.item_no BETWEEN $2 AND $3 ORDER BY x.item_no",
	3, {INT8OID, INT8OID, INT8OID}
};

/* Mark the suspects in a page that was just read. */
void
redrive_mark_suspects(RedriveChunk *chunk)
{
	Datum		values[3];
	uint64		rows;
	int			i = 0;

	chunk->suspects = false;
	if (!chunk->crashed)
		return;
	values[0] = Int64GetDatum(chunk->batch_id);
	values[1] = Int64GetDatum(chunk->page[0].item_no);
	values[2] = Int64GetDatum(chunk->page[chunk->page_items - 1].item_no);
	rows = redrive_sql(&find_suspects, values, NULL);
	for (uint64 row = 0; row < rows; row++)
	{
		int64		item_no = redrive_int64(row, "item_no");
		bool		isnull;

		while (i < chunk->page_items && chunk->page[i].item_no < item_no)
			i++;
		if (i == chunk->page_items)
			break;
		if (chunk->page[i].item_no != item_no)
			continue;			/* not an item of this retry chunk */
		chunk->page[i].suspect = chunk->suspects = true;
		chunk->page[i].crash_count = DatumGetInt32(redrive_column(row, "crash_count", &isnull));
	}
}

/*
 * Return the index of the first suspect of the page, "from" or behind it; the end
 * of the page when there is none.
 */
int
redrive_next_suspect(RedriveChunk *chunk, int from)
{
	if (!chunk->suspects)
		return chunk->page_items;
	while (from < chunk->page_items && !chunk->page[from].suspect)
		from++;
	return from;
}
