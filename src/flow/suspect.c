/*-------------------------------------------------------------------------
 *
 * suspect.c
 *	  Items that may crash the server.
 *
 * An item that crashed the server once runs alone, with what was before it
 * committed: if it does so again it is to blame, and nothing else is lost.  It is
 * not run a third time.  Only a chunk that lost its worker, and one of failures,
 * can have such items; the others are spared the look.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "catalog/pg_type.h"

#include "base/spi_call.h"
#include "flow/suspect.h"

static RedriveSql find_suspects = {
	"SELECT greatest(c.suspect_to, (SELECT c.to_no FROM redrive.crashes AS y WHERE y.batch_id = c.batch_id AND y.item_no = 0)) AS suspect_to,"
	" x.item_no, x.crash_count FROM redrive.chunks AS c"
	" LEFT JOIN redrive.crashes AS x ON x.batch_id = c.batch_id AND x.item_no BETWEEN $2 AND $3"
	" WHERE c.chunk_id = $1 ORDER BY x.item_no",
	3, {INT8OID, INT8OID, INT8OID}
};

/*
 * Mark the items of a page that was just read: those that crashed the server, and
 * those that may have, when nobody could say which it was.
 */
void
redrive_mark_suspects(RedriveChunk *chunk)
{
	Datum		values[3];
	uint64		rows;
	int64		suspect_to;
	int			i = 0;

	chunk->suspects = false;
	if (!chunk->rescued && !chunk->retry)
		return;
	values[0] = Int64GetDatum(chunk->chunk_id);
	values[1] = Int64GetDatum(chunk->page[0].item_no);
	values[2] = Int64GetDatum(chunk->page[chunk->page_items - 1].item_no);
	rows = redrive_sql(&find_suspects, values, NULL);
	for (uint64 row = 0; row < rows; row++)
	{
		bool		isnull;
		int64		item_no = redrive_int64(row, "item_no");
		int32		crash_count = DatumGetInt32(redrive_column(row, "crash_count", &isnull));

		if (isnull)
			break;				/* none has crashed it */
		while (i < chunk->page_items && chunk->page[i].item_no < item_no)
			i++;
		if (i < chunk->page_items && chunk->page[i].item_no == item_no)
		{
			chunk->page[i].crash_count = crash_count;
			chunk->suspects = true;
		}
	}
	suspect_to = rows > 0 ? redrive_int64(0, "suspect_to") : 0;
	for (i = 0; i < chunk->page_items && chunk->page[i].item_no <= suspect_to; i++)
		;
	if (i > 0)
	{
		chunk->alone_to = i;
		chunk->commit_each = true;
	}
}

/*
 * Return the index of the first item of the page, "from" or behind it, that
 * crashed the server before; the end of the page when there is none.
 */
int
redrive_next_suspect(RedriveChunk *chunk, int from)
{
	if (!chunk->suspects)
		return chunk->page_items;
	while (from < chunk->page_items && chunk->page[from].crash_count == 0)
		from++;
	return from;
}
