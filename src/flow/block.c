/*-------------------------------------------------------------------------
 *
 * block.c
 *	  Items are stored in blocks of neighbours.
 *
 * One row, one index entry and one WAL record serve many small items.  Blocks
 * are never updated.  Keys are locked for the whole submission at once.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "catalog/pg_type.h"
#include "utils/array.h"
#include "utils/builtins.h"

#include "base/compat.h"
#include "base/spi_call.h"
#include "flow/block.h"

#define MAX_KEY_BYTES 1024

static RedrivePartSql insert_block =
{
	"INSERT INTO redrive.item_blocks_@ (part, batch_id, first_no, items, bytes, keys, payloads)"
	" VALUES ($1, $2, $3, $4, $5, $6, $7)",
	7,
	{
		INT2OID, INT8OID, INT8OID, INT4OID, INT4OID, TEXTARRAYOID, JSONBARRAYOID
	}
};

/* In key order, so that two submitters wait for each other in one direction. */
static RedrivePartSql insert_locks =
{
	"INSERT INTO redrive.locks (handler_id, key, batch_id, item_no)"
	" SELECT $1, u.key, b.batch_id, b.first_no + u.position - 1"
	" FROM redrive.item_blocks_@ AS b CROSS JOIN LATERAL unnest(b.keys) WITH ORDINALITY AS u (key, position)"
	" WHERE b.part = $2 AND b.batch_id = $3 AND b.first_no >= $4 AND u.key IS NOT NULL"
	" ORDER BY u.key"
	" ON CONFLICT DO NOTHING",
	4,
	{
		INT4OID, INT2OID, INT8OID, INT8OID
	}
};

static RedrivePartSql find_lock_holder =
{
	"SELECT u.key, l.batch_id"
	" FROM redrive.item_blocks_@ AS b CROSS JOIN LATERAL unnest(b.keys) WITH ORDINALITY AS u (key, position)"
	" JOIN redrive.locks AS l ON l.handler_id = $1 AND l.key = u.key"
	" WHERE b.part = $2 AND b.batch_id = $3 AND b.first_no >= $4"
	" AND (l.batch_id, l.item_no) IS DISTINCT FROM (b.batch_id, b.first_no + u.position - 1)"
	" LIMIT 1",
	4,
	{
		INT4OID, INT2OID, INT8OID, INT8OID
	}
};

/* Begin to write blocks of a batch that has so many items already. */
BlockWriter *
redrive_block_writer(int16 part, int64 batch_id, int64 items_before)
{
	BlockWriter *writer = palloc0(sizeof(BlockWriter));

	writer->part = part;
	writer->batch_id = batch_id;
	writer->first_no = items_before + 1;
	return writer;
}

/* Store the block that is being filled, if there is anything in it. */
void
redrive_flush_block(BlockWriter *writer)
{
	Datum		values[7];
	char		nulls[] = "       ";
	int			dims[1] = {writer->items};
	int			lbs[1] = {1};

	if (writer->items == 0)
		return;
	values[0] = Int16GetDatum(writer->part);
	values[1] = Int64GetDatum(writer->batch_id);
	values[2] = Int64GetDatum(writer->first_no);
	values[3] = Int32GetDatum(writer->items);
	values[4] = Int32GetDatum((int32) Min(writer->bytes, PG_INT32_MAX));
	if (writer->has_key)
		values[5] = PointerGetDatum(construct_md_array(writer->keys, writer->key_nulls, 1, dims, lbs,
													   TEXTOID, -1, false, TYPALIGN_INT));
	else
	{
		values[5] = (Datum) 0;
		nulls[5] = 'n';
	}
	values[6] = PointerGetDatum(construct_array(writer->payloads, writer->items, JSONBOID, -1, false, TYPALIGN_INT));
	(void) redrive_part_sql(&insert_block, writer->part, values, nulls);
	pfree(DatumGetPointer(values[6]));
	if (writer->has_key)
		pfree(DatumGetPointer(values[5]));

	writer->first_no += writer->items;
	writer->items = 0;
	writer->bytes = 0;
	writer->has_key = false;
}

/* Refuse a key that is too long for its index; what = the name it has for the user. */
void
redrive_check_key(text * key, const char *what)
{
	Size		bytes = VARSIZE_ANY_EXHDR(key);

	if (bytes > MAX_KEY_BYTES)
		ereport(ERROR,
				(errcode(ERRCODE_STRING_DATA_RIGHT_TRUNCATION),
				 errmsg("%s is too long", what),
				 errdetail("It has %zu bytes, the limit is %d.", bytes, MAX_KEY_BYTES),
				 errhint("Use a shorter identifier, for example a digest of the long one.")));
}

/*
 * Add an item.  The datums must stay valid until the block is stored.
 */
void
redrive_add_item(BlockWriter *writer, Datum payload, Datum key, bool key_isnull)
{
	Size		bytes = VARSIZE_ANY(DatumGetPointer(payload));

	if (!key_isnull)
	{
		redrive_check_key((text *) DatumGetPointer(key), "key");
		bytes += VARSIZE_ANY_EXHDR(DatumGetPointer(key)) + VARHDRSZ;
	}
	if (writer->items == BLOCK_ITEMS || (writer->items > 0 && writer->bytes + bytes > BLOCK_BYTES))
		redrive_flush_block(writer);
	writer->payloads[writer->items] = payload;
	writer->keys[writer->items] = key;
	writer->key_nulls[writer->items] = key_isnull;
	if (!key_isnull)
	{
		writer->has_key = true;
		writer->keys_total++;
	}
	writer->items++;
	writer->bytes += bytes;
}

/* Lock the keys of the items from first_no on. */
void
redrive_lock_keys(BlockWriter *writer, int32 handler_id, int64 first_no)
{
	Datum		values[4];

	if (writer->keys_total == 0)
		return;
	values[0] = Int32GetDatum(handler_id);
	values[1] = Int16GetDatum(writer->part);
	values[2] = Int64GetDatum(writer->batch_id);
	values[3] = Int64GetDatum(first_no);
	if (redrive_part_sql(&insert_locks, writer->part, values, NULL) == writer->keys_total)
		return;
	if (redrive_part_sql(&find_lock_holder, writer->part, values, NULL) == 0)
		ereport(ERROR,
				(errcode(ERRCODE_LOCK_NOT_AVAILABLE),
				 errmsg("a key was locked by a batch that has just ended"),
				 errhint("Submit again.")));
	else
	{
		char	   *key = redrive_text(0, "key", CurrentMemoryContext);
		int64		holder = redrive_int64(0, "batch_id");

		if (holder == writer->batch_id)
			ereport(ERROR,
					(errcode(ERRCODE_DUPLICATE_OBJECT),
					 errmsg("key \"%s\" is given twice", key),
					 errhint("Each key may be live once per handler; leave the key NULL where there is none.")));
		ereport(ERROR,
				(errcode(ERRCODE_LOCK_NOT_AVAILABLE),
				 errmsg("key \"%s\" is locked", key),
				 errdetail("Batch %lld holds it.", (long long) holder),
				 errhint("Wait until its item is final, or cancel that batch; redrive.is_locked() tells.")));
	}
}
