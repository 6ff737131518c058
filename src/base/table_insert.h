/*-------------------------------------------------------------------------
 *
 * table_insert.h
 *	  Insert many rows into a table of ours.
 *
 *-------------------------------------------------------------------------
 */
#ifndef REDRIVE_TABLE_INSERT_H
#define REDRIVE_TABLE_INSERT_H

extern void redrive_table_insert(const char *table, int columns, int rows, Datum *values, bool *nulls);
extern Datum redrive_enum(const char *type, const char *label);

#endif							/* REDRIVE_TABLE_INSERT_H */
